/* cuda_on_cpu.h: a CUDA block, or a cluster of them, on the CPU. Included before everything else; the *.cuh of this
 * folder take the place of those of csrc/cuda/arch.
 *
 * Each thread of the block is a fiber, and runs until it has to wait for others. So a thread is ahead of all others by
 * as much as barriers allow, and shared memory begins as NaNs: what reads too early reads something wrong. Blocks run
 * one after the other, the blocks of a cluster together. Copies to shared memory happen at once: a missing wait for
 * them is not seen.
 *
 * What the kernel in front may still write is closed to a thread until it, or one that it has met since, has called
 * griddepcontrol_wait (guard.h). */
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include "guard.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#define __launch_bounds__(...)
#define __noinline__
#define threadIdx cpu::current->thread
#define blockIdx cpu::current->block
#define gridDim cpu::grid_dim
#define blockDim cpu::block_dim

namespace cpu {

constexpr int kSharedBytes = 227 << 10;

struct Index {
    unsigned x = 0, y = 0, z = 0;
};

/* Where so many fibers wait for each other. */
struct Meeting {
    unsigned expected = 0, arrived = 0, times = 0;
    unsigned waited_of_arrived = 0, waited = 0; /* Fiber::waited: of those who come next, of those who came last */
    inline void arrive();
    inline void arrive_and_wait();
};

struct Fiber {
    jmp_buf state;
    std::unique_ptr<char[]> stack;
    Index thread, block;
    unsigned rank; /* of its block in the cluster */
    bool done = false;
    const Meeting *meeting = nullptr; /* that it waits for, since it has been held so many times */
    unsigned times = 0;
    unsigned turn = 0, waited = 0; /* blocks it has been part of; the last of them in which it knew of the wait */
    void learn(unsigned of_other) { waited = std::max(waited, of_other); }
    bool has_waited() const { return waited == turn; }
    bool can_run() const { return !done && !(meeting && meeting->times == times); }
};
inline std::vector<Fiber> fibers;
inline Fiber *current;
inline jmp_buf caller; /* of run() */
inline Index grid_dim, block_dim;

/* Goes on with the next fiber that has something left to do, or with the caller of run(). */
[[noreturn]] inline void switch_to_next() {
    for (size_t i = 0; i < fibers.size(); i++) {
        current = current + 1 == fibers.data() + fibers.size() ? fibers.data() : current + 1;
        if (!current->can_run()) continue;
        guard::open(current->has_waited());
        _longjmp(current->state, 1);
    }
    _longjmp(caller, 1);
}

inline void yield() {
    if (_setjmp(current->state) == 0) switch_to_next();
}

void Meeting::arrive() {
    waited_of_arrived = std::max(waited_of_arrived, current->waited);
    if (++arrived < expected) return;
    arrived = 0;
    times++;
    waited = waited_of_arrived;
}

void Meeting::arrive_and_wait() {
    current->meeting = this;
    current->times = times;
    arrive();
    if (!current->can_run()) yield();
    current->learn(waited);
    guard::open(current->has_waited());
}

/* griddepcontrol.wait */
inline void wait_for_kernel_in_front() {
    current->waited = current->turn;
    guard::open(true);
}

/* Blocks that are watched; of the others all threads count as having waited, which saves time. */
inline bool is_watched(unsigned block) { return block < 3 || block + 1 == grid_dim.x; }

/* What the lanes of a warp show each other at a meeting; it stays until the one after the next. */
constexpr int kShown = 6;
struct Warp {
    Meeting meet{32};
    uint32_t shown[2][32][kShown];
};

constexpr size_t kStackBytes = 128 << 10;

/* The shared memory that a launch asked for, in units of 1 KB as on a GPU. Who reaches past its end crashes. */
struct SharedMemory {
    static constexpr size_t kPage = 64 << 10; /* or a multiple of one */
    size_t bytes, before;                     /* up to the page that nobody may touch */
    char *memory;
    explicit SharedMemory(size_t asked)
        : bytes((asked + 1023) / 1024 * 1024), before((bytes + kPage - 1) / kPage * kPage),
          memory(static_cast<char *>(
              mmap(nullptr, before + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0))) {
        if (memory == MAP_FAILED || mprotect(memory + before, kPage, PROT_NONE) != 0) abort();
    }
    SharedMemory(const SharedMemory &) = delete;
    ~SharedMemory() { munmap(memory, before + kPage); }
    char *data() { return memory + before - bytes; }
};

struct Block {
    Meeting meet, named[16];
    std::vector<Warp> warps;
    SharedMemory memory;
    char *const shared = memory.data();
    Block(unsigned threads, size_t shared_bytes) : meet{threads}, named{}, warps(threads / 32), memory(shared_bytes) {}
};

inline std::vector<std::unique_ptr<Block>> cluster;
inline Meeting cluster_meets;

inline Block &own_block() { return *cluster[current->rank]; }
inline Warp &own_warp() { return own_block().warps[current->thread.x / 32]; }
inline char *shared() { return own_block().shared; }

inline void (*to_run)(void *);
inline void *argument;

/* A fiber's first function: it comes into being, and later runs. */
inline void begin() {
    Fiber *const self = current;
    if (_setjmp(self->state) == 0) _longjmp(caller, 1);
    to_run(argument);
    self->done = true;
    switch_to_next();
}

/* Calls what() in every thread of so many blocks. */
template <typename What> void run(unsigned blocks, unsigned threads, unsigned ctas, size_t shared_bytes, What what) {
    grid_dim.x = blocks;
    block_dim.x = threads;
    cluster.clear();
    for (unsigned i = 0; i < ctas; i++) cluster.push_back(std::make_unique<Block>(threads, shared_bytes));
    cluster_meets = {ctas * threads};
    auto all_blocks = [&] {
        for (unsigned first = 0; first < blocks; first += ctas) {
            current->block.x = first + current->rank;
            if (current->thread.x == 0)
                memset(own_block().shared, 0xff, own_block().memory.bytes); /* NaN: what nobody has written */
            cluster_meets.arrive_and_wait();
            current->turn++;
            if (!is_watched(current->block.x)) current->waited = current->turn;
            guard::open(current->has_waited());
            what();
            cluster_meets.arrive_and_wait();
        }
    };
    to_run = [](void *of_all) { (*static_cast<decltype(all_blocks) *>(of_all))(); };
    argument = &all_blocks;
    fibers = std::vector<Fiber>(ctas * threads);
    for (unsigned i = 0; i < fibers.size(); i++) {
        current = &fibers[i];
        current->thread.x = i % threads;
        current->rank = i / threads;
        current->stack.reset(new char[kStackBytes]);
        ucontext_t context;
        getcontext(&context);
        context.uc_stack.ss_sp = current->stack.get();
        context.uc_stack.ss_size = kStackBytes - i * 320 % (kStackBytes / 4); /* tops of stacks share no cache lines */
        makecontext(&context, begin, 0);
        if (_setjmp(caller) == 0) setcontext(&context);
    }
    if (_setjmp(caller) == 0) switch_to_next();
    guard::open(true);
    for (const Fiber &fiber : fibers)
        if (!fiber.done) fputs("all threads wait for each other\n", stderr), abort();
}

/* All lanes of a warp call this together; each gets the words of all. */
template <typename... Word> auto show(Word... word) -> const uint32_t (&)[32][kShown] {
    static_assert(((sizeof(Word) == 4) && ...) && sizeof...(Word) <= kShown);
    Warp &warp = own_warp();
    auto &shown = warp.shown[warp.meet.times % 2];
    int i = 0;
    (memcpy(&shown[current->thread.x % 32][i++], &word, 4), ...);
    warp.meet.arrive_and_wait();
    return shown;
}

template <typename T> T show_one(T own, unsigned lane) {
    T other;
    memcpy(&other, show(own)[lane], 4);
    return other;
}

} // namespace cpu

inline void __syncthreads() { cpu::own_block().meet.arrive_and_wait(); }
inline void __syncwarp() { cpu::own_warp().meet.arrive_and_wait(); }
template <typename T> T __shfl_xor_sync(unsigned, T value, int lanes) {
    return cpu::show_one(value, threadIdx.x % 32 ^ static_cast<unsigned>(lanes));
}
template <typename T> T __shfl_sync(unsigned, T value, int from) {
    return cpu::show_one(value, static_cast<unsigned>(from) % 32);
}
inline int __all_sync(unsigned, int predicate) {
    const auto &of = cpu::show(predicate);
    return std::all_of(of, of + 32, [](const auto &shown) { return shown[0] != 0; });
}

template <typename Choose> unsigned reduce_lanes(unsigned value, Choose choose) {
    for (const auto &shown : cpu::show(value)) value = choose(value, shown[0]);
    return value;
}
inline unsigned __reduce_max_sync(unsigned, unsigned value) {
    return reduce_lanes(value, [](unsigned a, unsigned b) { return std::max(a, b); });
}
inline unsigned __reduce_min_sync(unsigned, unsigned value) {
    return reduce_lanes(value, [](unsigned a, unsigned b) { return std::min(a, b); });
}

using std::isinf;
using std::max;
using std::min;
template <typename T> void __stcg(T *p, T value) { *p = value; }
template <typename T> T atomicAdd(T *p, int value) {
    const T before = *p;
    *p += value;
    return before;
}
inline float rsqrtf(float v) { return 1 / std::sqrt(v); }
inline float __frsqrt_rn(float v) { return static_cast<float>(1 / std::sqrt(static_cast<double>(v))); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float normcdff(float v) { return static_cast<float>(0.5 * std::erfc(-v / std::sqrt(2.0))); }
inline float __uint_as_float(uint32_t bits) {
    float v;
    memcpy(&v, &bits, 4);
    return v;
}
inline uint32_t __float_as_uint(float v) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    return bits;
}
