/* norm_rows.cuh: the norm by spare warps of another kernel, row after row, while that kernel computes with the rows
 * before.
 *
 * Warps take rows in their order from a counter in the workspace, write y, and count the rows of each block of 128 that
 * are there; who needs a block waits for its count. Nothing here waits for anything, so every block gets there
 * whichever CTAs run. The kernel before has zeroed the counters. */
#pragma once

#include "cuda/arch/reduce.cuh"
#include "cuda/norm/rms_norm.cuh"

constexpr int kBlockRows = 128;

struct RowCounters {
    uint32_t *taken; /* one counter, then one per block: the rows of it that are done */
    int first_row;   /* a multiple of kBlockRows; the rows before it are there already */

    __device__ __forceinline__ uint32_t *done(int row) const { return taken + 1 + row / kBlockRows; }
};

static inline size_t row_counters(int64_t tokens) {
    return static_cast<size_t>(1 + (tokens + kBlockRows - 1) / kBlockRows);
}

/* By one thread: the rows of the block that begins with `row` are there, and copies see them. */
__device__ __forceinline__ void await_rows(const RowCounters &counters, int row, int tokens) {
    if (row < counters.first_row || row >= tokens) return;
    const int count = min(kBlockRows, tokens - row);
    while (static_cast<int>(load_acquire(counters.done(row))) < count) {
    }
}

/* A warp has 4 packets of a row a lane at a time, which is all of 1,024 values; a longer row comes in several rounds,
 * and twice. More registers the products of this kernel do not leave. */
constexpr int kRoundPackets = 4, kApart = 32 * 8, kRoundValues = kRoundPackets * kApart;

/* Host: rows one stride apart, of whole aligned packets. */
static inline bool norm_rows_fit(const mv_task *task) {
    return task->inner >= task->tokens && task->hidden % 8 == 0 && norm_rows_aligned<uint16_t>(task) &&
           is_aligned16(task->norm.weight);
}

/* Packets that are whole and aligned, 16 bytes in one instruction. */
template <typename T> __device__ __forceinline__ Packet<T> load_whole(const T *p) {
    return as_packet<T>(load_past_l1(reinterpret_cast<const uint4 *>(p)));
}
template <typename T> __device__ __forceinline__ void store_whole(T *p, const Packet<T> &packet) {
    __stcg(reinterpret_cast<uint4 *>(p), make_uint4(packet.word[0], packet.word[1], packet.word[2], packet.word[3]));
}

/* The same of float32 norm weights. */
template <typename T> __device__ __forceinline__ NormWeights<T> wide_norm_weights(const mv_task &task, int at) {
    const float *p = static_cast<const float *>(task.norm.weight) + at;
    const Packet<float> wide[] = {load_whole(p), load_whole(p + 4)};
    NormWeights<T> weights;
#pragma unroll
    for (int i = 0; i < Packet<T>::size; i++) weights.v[i] = task.norm.weight_offset + wide[i / 4].get(i % 4);
    return weights;
}

/* A lane's part of a round: `count` packets, kApart values apart, from k of a row. */
struct RowPart {
    int64_t row;
    int k, count;

    __device__ __forceinline__ RowPart(const mv_task &task, int row, int round)
        : row(row), k(round * kRoundValues + threadIdx.x % 32 * 8),
          count(min(kRoundPackets, (static_cast<int>(task.hidden) - k + kApart - 1) / kApart)) {}
    template <typename T> __device__ __forceinline__ T *of(mv_rows rows) const {
        return static_cast<T *>(rows.data) + row * rows.inner_stride + k;
    }
};

/* Its s: zeros past the end. The residual joins; `store` writes the sum. */
template <typename T> __device__ __forceinline__ void load_part(Packet<T> (&s)[kRoundPackets], const mv_task &task,
                                                                const RowPart &part, bool store) {
    const T *x = part.of<const T>(task.x);
#pragma unroll
    for (int j = 0; j < kRoundPackets; j++) s[j] = j < part.count ? load_whole(x + j * kApart) : Packet<T>{};
    if (!task.norm.residual.data) return;
    const T *residual = part.of<const T>(task.norm.residual);
#pragma unroll
    for (int j = 0; j < kRoundPackets; j++) {
        if (j >= part.count) continue;
        s[j] = add_residual(s[j], load_whole(residual + j * kApart));
        if (store && task.norm.residual_out.data) store_whole(part.of<T>(task.norm.residual_out) + j * kApart, s[j]);
    }
}

/* A row, into rows of y without gaps. */
template <typename T> __device__ __forceinline__ void normalise_row(const mv_task &task, int row, int rounds, T *y) {
    const bool twice = mv_norm_rounds_twice(task.rounding);
    const bool narrow = task.norm.weight_dtype == Dtype<T>::value, plain = twice && task.norm.weight_offset == 0;
    Packet<T> s[kRoundPackets];
    float squares = 0;
    for (int round = 0; round < rounds; round++) {
        load_part(s, task, RowPart(task, row, round), true);
#pragma unroll
        for (int j = 0; j < kRoundPackets; j++)
#pragma unroll
            for (int i = 0; i < 8; i++) squares = fmaf(s[j].get(i), s[j].get(i), squares);
    }
    const float r = row_factor<T>(warp_sum(squares), task);
    for (int round = 0; round < rounds; round++) {
        const RowPart part(task, row, round);
        if (rounds > 1) load_part(s, task, part, false);
        T *to = y + part.row * task.hidden + part.k;
        const T *weights = static_cast<const T *>(task.norm.weight) + part.k;
        if (narrow) {
            Packet<T> w[kRoundPackets]; /* all on their way before the first is used */
#pragma unroll
            for (int j = 0; j < kRoundPackets; j++)
                if (j < part.count) w[j] = load_whole(weights + j * kApart);
#pragma unroll
            for (int j = 0; j < kRoundPackets; j++)
                if (j < part.count)
                    store_whole(to + j * kApart, plain ? apply_norm_hf(s[j], r, w[j])
                                                       : apply_norm(s[j], r, widen_norm_weights<T>(task, w[j]), twice));
        } else {
#pragma unroll
            for (int j = 0; j < kRoundPackets; j++)
                if (j < part.count)
                    store_whole(to + j * kApart,
                                apply_norm(s[j], r, wide_norm_weights<T>(task, part.k + j * kApart), twice));
        }
    }
}

/* By whole warps, as many as there are: all rows from counters.first_row on, if there are any. */
template <typename T>
__device__ __forceinline__ void normalise_rows(const mv_task &task, const RowCounters &counters, T *y) {
    if (counters.first_row >= task.tokens) return;
    griddepcontrol_wait();
    const int rounds = (static_cast<int>(task.hidden) + kRoundValues - 1) / kRoundValues, lane = threadIdx.x % 32;
    const auto take = [&] { return lane == 0 ? static_cast<int>(atomicAdd(counters.taken, 1)) : 0; };
    const auto all = [](int of_first) { return __shfl_sync(0xffffffffu, of_first, 0); };
    int taken = take();
    for (;;) {
        const int row = counters.first_row + all(taken);
        if (row >= task.tokens) return;
        taken = take(); /* comes while this row is worked on */
        normalise_row(task, row, rounds, y);
        __syncwarp();
        if (lane == 0) add_release(counters.done(row), 1);
    }
}
