/* greedy_tokens.cuh: the largest logit of each row, and what follows from its index, in one launch.
 *
 * The launch is small, so latency decides. A row belongs to one block; on Hopper to a cluster of up to 16, for one SM
 * alone takes 3 us for the 300 KB of a large vocabulary. Threads go over the row 16 bytes at a time, with 4 loads on
 * their way, and keep the 16 bytes with the largest logit; which of these it is, they ask at the end. Each warp has a
 * largest logit and its index then. Those of all warps meet in the shared memory of the row's first block, to which the
 * blocks of a cluster write directly. Its first warp merges them, and one thread does the rest. So no block counts
 * others in global memory, nothing has to be zero before, and the result does not depend on who is first.
 *
 * Logits are compared as numbers: -0 equals 0, of equal ones the first counts, and NaN is the largest. Nothing is read
 * before the wait for the kernel in front. */
#pragma once

#include "cuda/arch/launch.cuh"
#include "cuda/arch/mma.cuh"
#include "cuda/arch/tma.cuh"
#include "cuda/arch/vec.cuh"
#include "cuda/decision.cuh"
#include "cuda/prices/sampling.cuh"

namespace {

constexpr int kAhead = 4;              /* 16-byte loads of a thread that are on their way */
constexpr int kLeastPackets = 512;     /* of a block of a cluster: with fewer, another block costs more than it saves */
constexpr uint32_t kNone = 0xffffffff; /* the index of a logit that is there for the comparison alone */

/* Threads of a block at most: one that has a row alone needs all that there are. */
template <bool kClusters> constexpr int kMostThreads = kClusters ? 512 : 1024;

/* How a row is cut. */
struct RowCut {
    int32_t blocks; /* of a row: 1, or those of its cluster */
};

/* A logit and its index, in a form that compares: the larger key, of equal keys the smaller index. */
struct Found {
    uint32_t key, index;
    __device__ __forceinline__ void take(const Found &other) {
        if (other.key > key || (other.key == key && other.index < index)) *this = other;
    }
};

/* Grows with the number: -0 and 0 are the same, and every NaN is the same, and the largest. */
__device__ __forceinline__ uint32_t key_of(float v) {
    const uint32_t bits = __float_as_uint(v + 0.0f);
    return v != v ? 0xffffffff : bits >> 31 ? ~bits : bits | 0x80000000;
}

__device__ __forceinline__ Found largest_of_warp(const Found &found) {
    const uint32_t key = __reduce_max_sync(0xffffffff, found.key);
    return {key, __reduce_min_sync(0xffffffff, found.key == key ? found.index : kNone)};
}

/* Does a number come in front of the largest one so far, which stands before it in the row? */
__device__ __forceinline__ bool exceeds(float v, float most) { return v > most || (v != v && most == most); }

/* Of the first `count` numbers; kWhole: of all or, where count is not positive, of none. */
template <bool kWhole, typename T> __device__ __forceinline__ float largest_of(const Packet<T> &packet, int64_t count) {
    if constexpr (sizeof(T) == 2) {
        if (kWhole || count >= Packet<T>::size) {
            using Pair = typename PairOf<T>::type;
            const Pair *pairs = reinterpret_cast<const Pair *>(packet.word);
            const Pair largest = __hmax2_nan(__hmax2_nan(pairs[0], pairs[1]), __hmax2_nan(pairs[2], pairs[3]));
            return count > 0 ? to_float(__hmax_nan(largest.x, largest.y)) : -INFINITY;
        }
    }
    float most = -INFINITY;
#pragma unroll
    for (int i = 0; i < Packet<T>::size; i++)
        if (i < count && exceeds(packet.get(i), most)) most = packet.get(i);
    return most;
}

/* The largest number that a thread has met, in the order of their indices, and the packet that has it. Which of the
 * packet's numbers it is, is asked once, at the end. */
template <typename T> struct Largest {
    float most = -INFINITY;
    uint32_t first = kNone; /* the index of the packet's first number */
    Packet<T> packet = {};

    /* Of a packet that begins `count` numbers in front of the row's end. */
    template <bool kWhole> __device__ __forceinline__ void meet(const Packet<T> &next, int64_t index, int64_t count) {
        const float v = largest_of<kWhole>(next, count);
        if (!exceeds(v, most)) return;
        most = v;
        first = static_cast<uint32_t>(index);
        packet = next;
    }

    __device__ __forceinline__ Found found(int64_t columns) const {
        uint32_t index = kNone;
#pragma unroll
        for (int i = Packet<T>::size - 1; i >= 0; i--) {
            const float v = packet.get(i);
            const bool is_it = v == most || (v != v && most != most);
            if (first != kNone && is_it && first + i < columns) index = first + i;
        }
        return {key_of(most), index};
    }
};

/* kWhole: all rows consist of whole packets that are aligned. */
template <typename T, bool kWhole> __device__ __forceinline__ Largest<T>
largest_of_thread(const T *row, int64_t columns, bool aligned, unsigned thread, unsigned threads) {
    constexpr int size = Packet<T>::size;
    const int64_t apart = static_cast<int64_t>(threads) * size;
    Largest<T> largest;
#pragma unroll 1
    for (int64_t first = static_cast<int64_t>(thread) * size; first < columns; first += kAhead * apart) {
        Packet<T> packets[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; i++) {
            const int64_t at = first + i * apart;
            if constexpr (kWhole)
                packets[i] = as_packet<T>(load_past_l1(row + at, at < columns));
            else
                packets[i] = load_packet(row + at, columns - at, aligned);
        }
#pragma unroll
        for (int i = 0; i < kAhead; i++)
            largest.template meet<kWhole>(packets[i], first + i * apart, columns - first - i * apart);
    }
    return largest;
}

/* What a row's last thread reads early, since it takes as long as a logit. */
struct RowState {
    bool is_finished = false;
    int64_t pad = 0, count = 0, position = 0;
    RowState() = default;
    __device__ __forceinline__ RowState(const mv_task &task, int64_t row) {
        const mv_greedy &greedy = task.greedy;
        if (greedy.finished.data) {
            is_finished = *row_address<const uint8_t>(greedy.finished, task.inner, row) != 0;
            pad = *greedy.pad;
        }
        if (greedy.counts.data) count = *row_address<const int64_t>(greedy.counts, task.inner, row);
        if (greedy.positions.data) position = *row_address<const int64_t>(greedy.positions, task.inner, row);
    }

    __device__ __forceinline__ void choose(const mv_task &task, int64_t row, int64_t largest) const {
        const mv_greedy &greedy = task.greedy;
        const int64_t token = is_finished ? pad : largest;
        *row_address<int64_t>(task.out, task.inner, row) = token;
        if (greedy.counts.data) {
            if (count >= 0 && count < greedy.length)
                row_address<int64_t>(greedy.history, task.inner, row)[count] = token;
            *row_address<int64_t>(greedy.counts, task.inner, row) = count + 1;
        }
        if (greedy.positions.data) *row_address<int64_t>(greedy.positions, task.inner, row) = position + 1;
        if (greedy.finished.data && !is_finished && reinterpret_cast<const uint8_t *>(greedy.ends)[largest])
            *row_address<uint8_t>(greedy.finished, task.inner, row) = 1;
    }
};

template <typename T, bool kWhole, bool kClusters> __global__ void __launch_bounds__(kMostThreads<kClusters>)
    greedy_tokens_kernel(const __grid_constant__ mv_task task, const __grid_constant__ RowCut cut, bool aligned) {
    extern __shared__ __align__(16) char smem[];
    const unsigned blocks = kClusters ? static_cast<unsigned>(cut.blocks) : 1, rank = blockIdx.x % blocks;
    const int64_t row = blockIdx.x / blocks;
    const unsigned warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32, all = blocks * warps;
    Found *const found = reinterpret_cast<Found *>(smem); /* by each warp of the row */
    const uint32_t all_sent = shared_address(found + all);
    const bool is_cluster = blocks > 1, is_last = rank == 0 && threadIdx.x == 0;
    if constexpr (kClusters)
        if (is_cluster) {
            if (threadIdx.x == 0) {
                mbarrier_init(all_sent, 1);
                mbarrier_init_fence();
            }
            cluster_barrier_arrive();
        }
    const T *logits = row_address<const T>(task.x, task.inner, row);
    griddepcontrol_wait();
    griddepcontrol_launch();

    const RowState state = is_last ? RowState(task, row) : RowState();
    const Largest<T> largest = largest_of_thread<T, kWhole>(logits, task.hidden, aligned,
                                                            rank * blockDim.x + threadIdx.x, blocks * blockDim.x);
    const Found own = largest_of_warp(largest.found(task.hidden));
    if constexpr (kClusters)
        if (is_cluster) {
            cluster_barrier_wait(); /* all have begun */
            if (lane == 0)
                send_to_cluster(cluster_address(shared_address(found + rank * warps + warp), 0),
                                __uint_as_float(own.key), __uint_as_float(own.index), cluster_address(all_sent, 0));
            if (rank > 0 || warp > 0) return;
            if (lane == 0) mbarrier_arrive_expect(all_sent, all * static_cast<uint32_t>(sizeof(Found)));
            mbarrier_wait(all_sent, 0);
        }
    if (!is_cluster) {
        if (lane == 0) found[warp] = own;
        __syncthreads();
        if (warp > 0) return;
    }

    Found best = {0, kNone};
    for (unsigned i = lane; i < all; i += 32) best.take(found[i]);
    best = largest_of_warp(best);
    /* Where all logits are -infinity none is larger than what each thread began with: the first one is it. */
    if (lane == 0) state.choose(task, row, best.index == kNone ? 0 : static_cast<int64_t>(best.index));
}

/* ---- host -------------------------------------------------------------------------------------------------------- */

template <typename T, bool kClusters>
mv_status launch_rows(const mv_task *task, const mv_decision *decision, mv_error *error) {
    const RowCut cut = cut_of<RowCut>(decision);
    constexpr int64_t size = Packet<T>::size;
    if (task->tokens > INT32_MAX / cut.blocks)
        return mv_fail(error, MV_BAD_VALUE, "greedy_tokens: logits has %lld rows, more than a GPU's grid takes",
                       static_cast<long long>(task->tokens));
    const int64_t packets = (task->hidden + size * cut.blocks - 1) / (size * cut.blocks);
    const int64_t warps = packets < kMostThreads<kClusters> ? (packets + 31) / 32 : kMostThreads<kClusters> / 32;
    const size_t smem_bytes = static_cast<size_t>(cut.blocks * warps) * sizeof(Found) + sizeof(uint64_t);
    const Grid grid = {static_cast<unsigned>(task->tokens * cut.blocks), static_cast<unsigned>(warps * 32), smem_bytes,
                       static_cast<unsigned>(cut.blocks)};
    const bool aligned = rows_aligned16(task->x, sizeof(T));
    if (aligned && task->hidden % size == 0)
        return launch<greedy_tokens_kernel<T, true, kClusters>>(task, grid, error, *task, cut, aligned);
    return launch<greedy_tokens_kernel<T, false, kClusters>>(task, grid, error, *task, cut, aligned);
}

/* As many blocks for a row as there are SMs for each, while each still has something to do. Clusters of 16 are for
 * GPUs whose groups of SMs are that large. */
template <bool kClusters> const char *decide_rows(const mv_task *task, double below, mv_decision *decision) {
    const int64_t size = 16 / static_cast<int64_t>(mv_dtype_bytes(task->dtype)), most = task->sm_count >= 100 ? 16 : 8;
    RowCut cut = {1};
    while (kClusters && 2 * cut.blocks <= most && 2 * cut.blocks * task->tokens <= task->sm_count &&
           task->hidden >= 2 * cut.blocks * kLeastPackets * size)
        cut.blocks *= 2;
    if (!mv_at_price(decision, prices::greedy_us(task, cut.blocks, kClusters), below)) return mv_too_dear;
    keep_cut(decision, cut);
    return nullptr;
}

} // namespace
