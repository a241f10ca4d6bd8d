// Warp-wide pieces of tensor-core kernels: asynchronous 16-byte copies, ldmatrix, mma.sync m16n8k16 with f32 sums.
// Under the shim each is a scalar stand-in with the real layout of fragments (PTX ISA, "Matrix Fragments for mma.m16n8k16").
//
// Of lane l, with g = l / 4 and t = l % 4:
//   A [16, 16]: a0 = (g, 2t..), a1 = (g + 8, 2t..), a2 = (g, 2t + 8..), a3 = (g + 8, 2t + 8..), two elements each
//   B [16, 8]:  b0 = (2t.., g), b1 = (2t + 8.., g), two elements down a column each
//   C [16, 8]:  c0, c1 = (g, 2t..), c2, c3 = (g + 8, 2t..)
#pragma once
#include "prelude.cuh"

// Elements that a row of a tile is longer in shared memory than its data. Rows are then an odd number of 16-byte chunks apart,
// as head sizes are whole pairs of chunks, and the eight rows of an 8 x 8 matrix lie in different banks.
constexpr u32 ROW_PADDING = 8;

#ifdef BATON_SHIM

// Copies 16 bytes, or fills with zeros where `is_there` is false; `from` is then not read.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool is_there) {
    baton_shim::Fiber* me = baton_shim::fiber;
    if (reinterpret_cast<uptr>(to) % 16 != 0 || (is_there && reinterpret_cast<uptr>(from) % 16 != 0))
        baton_shim::fail("an asynchronous copy that is not on 16 bytes");
    const baton_shim::PendingCopy copy{to, from, is_there};
    // When threads run in reverse a copy is done at once, which shows where it overwrites what others still read; else as late
    // as the wait allows, which shows where a wait is missing.
    if (baton_shim::cta->is_reversed) {
        copy.carry_out();
    } else {
        me->copies.push_back(copy);
        me->n_uncommitted++;
    }
}
__device__ __forceinline__ void copy_async_commit() {
    baton_shim::Fiber* me = baton_shim::fiber;
    me->groups.push_back(me->n_uncommitted);
    me->n_uncommitted = 0;
}
// Waits until at most N of this thread's groups are under way.
template <u32 N> __device__ __forceinline__ void copy_async_wait() {
    baton_shim::Fiber* me = baton_shim::fiber;
    while (me->groups.size() > N) {
        for (size_t i = 0; i < me->groups[0]; i++) me->copies[i].carry_out();
        me->copies.erase(me->copies.begin(), me->copies.begin() + static_cast<ptrdiff_t>(me->groups[0]));
        me->groups.erase(me->groups.begin());
    }
}

// Lane 8 i + r gives the address of row r (8 elements) of matrix i.
template <bool TRANSPOSED> __device__ __forceinline__ void load_matrices(u32 (&to)[4], const void* row) {
    using namespace baton_shim;
    Fiber* me = fiber;
    if (reinterpret_cast<uptr>(row) % 16 != 0) fail("ldmatrix of a row that is not on 16 bytes");
    me->slot[0] = reinterpret_cast<uptr>(row);
    wait_at(State::AtWarpBarrier, ALL_LANES);
    const u32 g = me->lane / 4, t = me->lane % 4;
    auto element = [&](u32 matrix, u32 r, u32 c) {
        return static_cast<u32>(reinterpret_cast<const u16*>(cta->fibers[me->warp * 32 + matrix * 8 + r].slot[0])[c]);
    };
    for (u32 i = 0; i < 4; i++)
        to[i] = TRANSPOSED ? element(i, 2 * t, g) | element(i, 2 * t + 1, g) << 16
                           : element(i, g, 2 * t) | element(i, g, 2 * t + 1) << 16;
    wait_at(State::AtWarpBarrier, ALL_LANES);
}

template <typename T> __device__ __forceinline__ void mma(f32 (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    using namespace baton_shim;
    Fiber* me = fiber;
    for (u32 i = 0; i < 4; i++) me->slot[i] = a[i];
    me->slot[4] = b0;
    me->slot[5] = b1;
    wait_at(State::AtWarpBarrier, ALL_LANES);
    const Fiber* warp = &cta->fibers[me->warp * 32];
    const u32 g = me->lane / 4, t = me->lane % 4;
    auto half = [](u64 pair, u32 k) { return to_f32(T{static_cast<u16>(pair >> 16 * (k & 1))}); };
    auto a_at = [&](u32 row, u32 k) { return half(warp[row % 8 * 4 + k % 8 / 2].slot[row / 8 + k / 8 * 2], k); };
    auto b_at = [&](u32 k, u32 n) { return half(warp[n * 4 + k % 8 / 2].slot[4 + k / 8], k); };
    for (u32 i = 0; i < 4; i++) {
        const u32 row = g + i / 2 * 8, n = 2 * t + i % 2;
        f32 sum = 0.0f;
        for (u32 k = 0; k < 16; k++) sum += a_at(row, k) * b_at(k, n);
        c[i] += sum;
    }
    wait_at(State::AtWarpBarrier, ALL_LANES);
}

__device__ __forceinline__ f32 exp2_approx(f32 x) { return exp2f(x); }

#else

__device__ __forceinline__ u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ void copy_async(void* to, const void* from, bool is_there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(is_there ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <u32 N> __device__ __forceinline__ void copy_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

template <bool TRANSPOSED> __device__ __forceinline__ void load_matrices(u32 (&to)[4], const void* row) {
    if constexpr (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(shared_address(row))
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(shared_address(row))
                     : "memory");
}

template <typename T> __device__ __forceinline__ void mma(f32 (&c)[4], const u32 (&a)[4], u32 b0, u32 b1);
template <> __device__ __forceinline__ void mma<bf16>(f32 (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <> __device__ __forceinline__ void mma<f16>(f32 (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ f32 exp2_approx(f32 x) {
    f32 y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#endif

// A [16, 16] of a row-major tile: the fragment of rows row.. and columns col.. .
template <typename T> __device__ __forceinline__ void load_a(u32 (&a)[4], const T* tile, u32 stride, u32 row, u32 col) {
    const u32 lane = threadIdx.x % WARP, matrix = lane / 8;
    load_matrices<false>(a, tile + (row + lane % 8 + matrix % 2 * 8) * stride + col + matrix / 2 * 8);
}

// B [16, 16] of a tile with a row for each column of B, as K and weights are: b0, b1 of columns n.., then of n + 8.. .
template <typename T> __device__ __forceinline__ void load_b(u32 (&b)[4], const T* tile, u32 stride, u32 n, u32 k) {
    const u32 lane = threadIdx.x % WARP, matrix = lane / 8;
    load_matrices<false>(b, tile + (n + lane % 8 + matrix / 2 * 8) * stride + k + matrix % 2 * 8);
}

// B [16, 16] of a tile with a row for each row of B, as V is: b0, b1 of columns n.., then of n + 8.. .
template <typename T> __device__ __forceinline__ void load_b_transposed(u32 (&b)[4], const T* tile, u32 stride, u32 k, u32 n) {
    const u32 lane = threadIdx.x % WARP, matrix = lane / 8;
    load_matrices<true>(b, tile + (k + lane % 8 + matrix % 2 * 8) * stride + n + matrix / 2 * 8);
}
