// CUDA's words for g++: a kernel as ordinary C++ that runs on the CPU, for tests. Not fast, and no emulator of a memory model.
//
// Each CUDA thread is a fiber with a stack of its own, switched at barriers and at warp exchanges only; a CTA runs on one
// system thread. Shared memory starts as NaN. What it shows: wrong results, accesses out of bounds (with a sanitizer),
// barriers that not all threads reach (aborts), asynchronous copies nobody waited for, and most missing barriers, as results
// change with the order in which threads run and copies are done (baton_shim_reverse). What it does not show: races within
// one thread's turn, and what different warps see without a fence.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <utility>
#include <vector>
#if !defined(__x86_64__) || defined(BATON_SHIM_UCONTEXT)
#include <ucontext.h>
#endif

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef uintptr_t uptr;

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __align__(n) __attribute__((aligned(n)))
// A CTA runs to its end on one system thread, so what a CTA shares is what a system thread has to itself.
#define __shared__ static thread_local

struct uint3 {
    unsigned x, y, z;
};

namespace baton_shim {

constexpr size_t STACK_BYTES = 64 * 1024;
constexpr unsigned WARP_LANES = 32;

enum class State : uint8_t { Ready, AtCtaBarrier, AtWarpBarrier, Done };

// An asynchronous copy of 16 bytes into shared memory, of zeros where the source is not there.
struct PendingCopy {
    void* to;
    const void* from;
    bool is_there;

    void carry_out() const {
        if (is_there)
            memcpy(to, from, 16);
        else
            memset(to, 0, 16);
    }
};

struct Fiber {
    uint3 thread_idx;
    unsigned lane, warp, mask;
    State state;
    bool has_started;
    int stack_idx;
    void* stack_pointer;
#if !defined(__x86_64__) || defined(BATON_SHIM_UCONTEXT)
    ucontext_t context;
#endif
    // What a lane shows to its warp.
    uint64_t slot[8];
    std::vector<PendingCopy> copies;
    // Copies in each group committed and not yet waited for, oldest first.
    std::vector<size_t> groups;
    size_t n_uncommitted;
};

struct Cta {
    uint3 grid, block, idx;
    unsigned n_threads;
    bool is_reversed;
    std::vector<Fiber> fibers;
    std::vector<std::unique_ptr<char[]>> stacks;
    std::vector<int> free_stacks;
    std::vector<char> shared;
    char* shared_base;
    const std::function<void()>* body;
    void* main_stack_pointer;
#if !defined(__x86_64__) || defined(BATON_SHIM_UCONTEXT)
    ucontext_t main_context;
#endif
};

inline thread_local Cta* cta = nullptr;
inline thread_local Fiber* fiber = nullptr;
// Asked for by a thread for the launches it makes.
inline thread_local bool reverse_order = false;

[[noreturn]] inline void fail(const char* what) {
    const uint3 i = cta->idx;
    fprintf(stderr, "shim: %s in CTA (%u, %u, %u); threads' states: ", what, i.x, i.y, i.z);
    for (const Fiber& f : cta->fibers) fprintf(stderr, "%d", static_cast<int>(f.state));
    fprintf(stderr, " (0 ready, 1 at a CTA barrier, 2 at a warp barrier, 3 done)\n");
    abort();
}

#if defined(__x86_64__) && !defined(BATON_SHIM_UCONTEXT)
extern "C" void baton_shim_switch(void** save, void* to) __attribute__((visibility("hidden")));
// Saves what the System V ABI says a callee keeps, and goes on at the other stack. Weak: each library has one of its own.
__asm__(
    ".text\n.weak baton_shim_switch\n.hidden baton_shim_switch\n.type baton_shim_switch,@function\nbaton_shim_switch:\n"
    " push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n mov %rsp,(%rdi)\n mov %rsi,%rsp\n"
    " pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n.size baton_shim_switch,.-baton_shim_switch\n");

inline void leave_fiber(Fiber* me) { baton_shim_switch(&me->stack_pointer, cta->main_stack_pointer); }
inline void enter_fiber(Fiber* f) { baton_shim_switch(&cta->main_stack_pointer, f->stack_pointer); }

inline void fiber_main() {
    (*cta->body)();
    fiber->state = State::Done;
    leave_fiber(fiber);
    __builtin_trap();
}

inline void prepare_fiber(Fiber& f) {
    void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(cta->stacks[f.stack_idx].get() + STACK_BYTES) & ~uintptr_t{15});
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(&fiber_main);
    for (int i = 0; i < 6; i++) *--top = nullptr;
    f.stack_pointer = top;
}
#else
inline void leave_fiber(Fiber* me) { swapcontext(&me->context, &cta->main_context); }
inline void enter_fiber(Fiber* f) { swapcontext(&cta->main_context, &f->context); }

inline void fiber_main() {
    (*cta->body)();
    fiber->state = State::Done;
    leave_fiber(fiber);
}

inline void prepare_fiber(Fiber& f) {
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = cta->stacks[f.stack_idx].get();
    f.context.uc_stack.ss_size = STACK_BYTES;
    f.context.uc_link = nullptr;
    makecontext(&f.context, fiber_main, 0);
}
#endif

// Not inlined, so that no address of a thread_local outlives a switch.
__attribute__((noinline)) inline void wait_at(State state, unsigned mask) {
    Fiber* me = fiber;
    me->state = state;
    me->mask = mask;
    leave_fiber(me);
    fiber = me;
}

inline void run_until_it_waits(Fiber& f) {
    if (!f.has_started) {
        f.has_started = true;
        if (cta->free_stacks.empty()) {
            cta->free_stacks.push_back(static_cast<int>(cta->stacks.size()));
            cta->stacks.emplace_back(new char[STACK_BYTES]);
        }
        f.stack_idx = cta->free_stacks.back();
        cta->free_stacks.pop_back();
        prepare_fiber(f);
    }
    fiber = &f;
    enter_fiber(&f);
    if (f.state == State::Done) {
        if (!f.copies.empty()) fail("an asynchronous copy that nobody waited for");
        cta->free_stacks.push_back(f.stack_idx);
    }
}

// Lets those lanes of a warp go on whose whole mask has come to the barrier; exited lanes count as come.
inline bool release_warp(unsigned first, unsigned end) {
    bool released = false;
    for (unsigned i = first; i < end; i++) {
        if (cta->fibers[i].state != State::AtWarpBarrier) continue;
        const unsigned mask = cta->fibers[i].mask;
        bool all_came = true;
        for (unsigned j = first; j < end; j++) {
            const State state = cta->fibers[j].state;
            if (mask >> (j - first) & 1 && state != State::AtWarpBarrier && state != State::Done) all_came = false;
        }
        if (!all_came) continue;
        for (unsigned j = first; j < end; j++)
            if (mask >> (j - first) & 1 && cta->fibers[j].state == State::AtWarpBarrier) cta->fibers[j].state = State::Ready;
        released = true;
    }
    return released;
}

inline void run_cta() {
    const unsigned n = cta->n_threads, n_warps = (n + WARP_LANES - 1) / WARP_LANES;
    for (unsigned i = 0; i < n; i++) {
        Fiber& f = cta->fibers[i];
        const uint3 b = cta->block;
        f.thread_idx = {i % b.x, i / b.x % b.y, i / (b.x * b.y)};
        f.lane = i % WARP_LANES;
        f.warp = i / WARP_LANES;
        f.state = State::Ready;
        f.has_started = false;
        f.copies.clear();
        f.groups.clear();
        f.n_uncommitted = 0;
    }
    for (;;) {
        bool has_run = false;
        for (unsigned w = 0; w < n_warps; w++) {
            const unsigned warp = cta->is_reversed ? n_warps - 1 - w : w;
            const unsigned first = warp * WARP_LANES, end = std::min(n, first + WARP_LANES);
            do {
                for (unsigned k = first; k < end; k++) {
                    Fiber& f = cta->fibers[cta->is_reversed ? end - 1 - (k - first) : k];
                    if (f.state != State::Ready) continue;
                    run_until_it_waits(f);
                    has_run = true;
                }
            } while (release_warp(first, end));
        }
        unsigned n_done = 0, n_at_barrier = 0;
        for (const Fiber& f : cta->fibers) {
            n_done += f.state == State::Done;
            n_at_barrier += f.state == State::AtCtaBarrier;
        }
        if (n_done == n) return;
        if (n_done + n_at_barrier == n) {
            for (Fiber& f : cta->fibers)
                if (f.state == State::AtCtaBarrier) f.state = State::Ready;
        } else if (!has_run) {
            fail("a barrier that not all threads reach");
        }
    }
}

inline void launch(uint3 grid, uint3 block, size_t shared_bytes, const std::function<void()>& body) {
    const uint64_t n_ctas = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
    const unsigned n_threads = block.x * block.y * block.z;
    const bool is_reversed = reverse_order;
    std::atomic<uint64_t> next{0};
    auto work = [&] {
        Cta mine{};
        mine.grid = grid;
        mine.block = block;
        mine.n_threads = n_threads;
        mine.is_reversed = is_reversed;
        mine.body = &body;
        mine.fibers.resize(n_threads);
        mine.shared.resize(shared_bytes + 128);
        // At the end of its allocation but for alignment, so that a sanitizer sees what runs over.
        mine.shared_base = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(mine.shared.data()) + 127) & ~uintptr_t{127});
        cta = &mine;
        for (uint64_t i; (i = next++) < n_ctas;) {
            mine.idx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                        static_cast<unsigned>(i / grid.x / grid.y)};
            memset(mine.shared.data(), 0xff, mine.shared.size());
            run_cta();
        }
        cta = nullptr;
    };
    // A thread costs some 20 us to start: a few thousand fibers' worth.
    const uint64_t n_useful = n_ctas * n_threads / 8192 + 1;
    const uint64_t n_workers = std::min({n_useful, n_ctas, static_cast<uint64_t>(std::thread::hardware_concurrency())});
    std::vector<std::thread> workers;
    for (uint64_t i = 1; i < n_workers; i++) workers.emplace_back(work);
    work();
    for (std::thread& worker : workers) worker.join();
}

template <typename... Params, size_t... I>
void launch_with(void (*kernel)(Params...), uint3 grid, uint3 block, size_t shared_bytes, void** args, std::index_sequence<I...>) {
    const std::function<void()> body = [=] { kernel(*static_cast<Params*>(args[I])...); };
    launch(grid, block, shared_bytes, body);
}

template <typename... Params> constexpr unsigned n_params(void (*)(Params...)) { return sizeof...(Params); }

template <typename... Params>
void launch_kernel(void (*kernel)(Params...), uint3 grid, uint3 block, size_t shared_bytes, void** args) {
    launch_with(kernel, grid, block, shared_bytes, args, std::index_sequence_for<Params...>{});
}

// ---- conversions, nearest even -------------------------------------------------------------------------------------------

inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}
inline float f32_of_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
inline uint16_t bf16_of_f32(float x) {
    const uint32_t bits = bits_of(x);
    if (x != x) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float f32_of_f16(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, magnitude = half & 0x7fff;
    if (magnitude >= 0x7c00) return f32_of_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    // 2^-24 is the smallest f16 above 0; the product is exact.
    if (magnitude < 0x400) return f32_of_bits(sign | bits_of(static_cast<float>(magnitude) * 5.9604644775390625e-8f));
    return f32_of_bits(sign | ((magnitude << 13) + ((127 - 15) << 23)));
}
inline uint16_t f16_of_f32(float x) {
    const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return 0x7fff;
    if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
    if (magnitude < 0x38800000) {
        // Below 2^-14: adding 0.5 puts the unit of the last place at 2^-24, and the addition rounds to nearest even.
        const float shifted = f32_of_bits(magnitude) + 0.5f;
        return static_cast<uint16_t>(sign | (bits_of(shifted) - bits_of(0.5f)));
    }
    return static_cast<uint16_t>(sign | ((magnitude - ((127 - 15) << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13));
}

}  // namespace baton_shim

#define threadIdx (::baton_shim::fiber->thread_idx)
#define blockIdx (::baton_shim::cta->idx)
#define blockDim (::baton_shim::cta->block)
#define gridDim (::baton_shim::cta->grid)

#define BATON_DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(::baton_shim::cta->shared_base)
#define BATON_EXPORT(op)                                                                                                  \
    extern "C" __attribute__((visibility("default"))) void op##__launch(                                                  \
        unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y, unsigned block_z,           \
        size_t shared_bytes, void** args) {                                                                               \
        ::baton_shim::launch_kernel(op, {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared_bytes, args);         \
    }                                                                                                                     \
    extern "C" __attribute__((visibility("default"))) unsigned op##__n_params() { return ::baton_shim::n_params(op); }

// The calling thread's next launches run from the last thread of a CTA to the first (1), or from the first to the last (0):
// results must not differ.
extern "C" __attribute__((visibility("default"), weak)) void baton_shim_reverse(int on) { ::baton_shim::reverse_order = on != 0; }

// ---- CUDA's functions ------------------------------------------------------------------------------------------------------

inline void __syncthreads() { baton_shim::wait_at(baton_shim::State::AtCtaBarrier, 0); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { baton_shim::wait_at(baton_shim::State::AtWarpBarrier, mask); }
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

template <typename T> T baton_shim_exchange(unsigned mask, T value, unsigned source_lane) {
    static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
    using namespace baton_shim;
    Fiber* me = fiber;
    memcpy(me->slot, &value, sizeof(T));
    wait_at(State::AtWarpBarrier, mask);
    const unsigned source = me->warp * WARP_LANES + source_lane % WARP_LANES;
    if (source >= cta->n_threads || !(mask >> source_lane % WARP_LANES & 1)) fail("a shuffle from a lane that is not there");
    memcpy(&value, cta->fibers[source].slot, sizeof(T));
    wait_at(State::AtWarpBarrier, mask);
    return value;
}
template <typename T> T __shfl_sync(unsigned mask, T value, int source) { return baton_shim_exchange(mask, value, source); }
template <typename T> T __shfl_xor_sync(unsigned mask, T value, int bits) {
    return baton_shim_exchange(mask, value, baton_shim::fiber->lane ^ bits);
}
// Beyond the warp's end a lane keeps its own.
template <typename T> T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
    const unsigned lane = baton_shim::fiber->lane;
    return baton_shim_exchange(mask, value, lane + delta < 32 ? lane + delta : lane);
}
template <typename T> T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
    const unsigned lane = baton_shim::fiber->lane;
    return baton_shim_exchange(mask, value, lane >= delta ? lane - delta : lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    using namespace baton_shim;
    Fiber* me = fiber;
    me->slot[0] = predicate != 0;
    wait_at(State::AtWarpBarrier, mask);
    unsigned votes = 0;
    for (unsigned lane = 0; lane < WARP_LANES; lane++) {
        const unsigned i = me->warp * WARP_LANES + lane;
        if (mask >> lane & 1 && i < cta->n_threads && cta->fibers[i].slot[0]) votes |= 1u << lane;
    }
    wait_at(State::AtWarpBarrier, mask);
    return votes;
}
inline int __syncthreads_or(int predicate) {
    using namespace baton_shim;
    Fiber* me = fiber;
    me->slot[0] = predicate != 0;
    wait_at(State::AtCtaBarrier, 0);
    int any = 0;
    for (const Fiber& f : cta->fibers) any |= f.slot[0] != 0;
    wait_at(State::AtCtaBarrier, 0);
    return any;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
inline float __uint_as_float(unsigned x) { return baton_shim::f32_of_bits(x); }
inline unsigned __float_as_uint(float x) { return baton_shim::bits_of(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __fdividef(float a, float b) { return a / b; }
// Built with -ffp-contract=off, so these are what they say.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
template <typename T> T min(T a, T b) { return b < a ? b : a; }
template <typename T> T max(T a, T b) { return a < b ? b : a; }
template <typename T> T atomicAdd(T* to, T x) { return __atomic_fetch_add(to, x, __ATOMIC_SEQ_CST); }
