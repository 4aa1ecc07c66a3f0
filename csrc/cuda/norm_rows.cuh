/* norm_rows.cuh: the norm by spare warps of another kernel, row after row, while that kernel computes with the rows
 * before.
 *
 * Warps take rows in their order from a counter in the workspace, write y, and count the rows of each block of 128 that
 * are there; who needs a block waits for its count. Nothing here waits for anything, so every block gets there
 * whichever CTAs run. The kernel before has zeroed the counters. */
#pragma once

#include "reduce.cuh"
#include "rms_norm.cuh"

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

/* A warp's registers hold 16 packets a lane: 4 rows of up to 1,024 values, 2 of up to 2,048, or up to 4,096 of one row;
 * longer rows come in several rounds, and twice. */
constexpr int kHeldPackets = 16, kRoundValues = kHeldPackets * 32 * 8;

/* Host: rows one stride apart, of whole aligned packets. */
static inline bool norm_rows_fit(const mv_task *task) {
    return task->inner >= task->tokens && task->hidden % 8 == 0 && norm_rows_aligned<uint16_t>(task) &&
           is_aligned16(task->norm_weight);
}

/* Packets that are whole and aligned, 16 bytes in one instruction. */
template <typename T> __device__ __forceinline__ Packet<T> load_whole(const T *p) {
    return as_packet<T>(__ldcg(reinterpret_cast<const uint4 *>(p)));
}
template <typename T> __device__ __forceinline__ void store_whole(T *p, const Packet<T> &packet) {
    __stcg(reinterpret_cast<uint4 *>(p), make_uint4(packet.word[0], packet.word[1], packet.word[2], packet.word[3]));
}

/* The same of float32 norm weights. */
template <typename T> __device__ __forceinline__ NormWeights<T> wide_norm_weights(const mv_task &task, int at) {
    const float *p = static_cast<const float *>(task.norm_weight) + at;
    const Packet<float> wide[] = {load_whole(p), load_whole(p + 4)};
    NormWeights<T> weights;
#pragma unroll
    for (int i = 0; i < Packet<T>::size; i++) weights.v[i] = task.weight_offset + wide[i / 4].get(i % 4);
    return weights;
}

/* A quarter of a warp's packets: `count` of this lane's 4, kApart values apart, from k of a row. */
constexpr int kQuarters = 4, kApart = 32 * 8;
struct Quarter {
    int64_t row;
    int k, count;
    template <typename T> __device__ __forceinline__ T *of(mv_rows rows) const {
        return static_cast<T *>(rows.data) + row * rows.inner_stride + k;
    }
};

/* Quarter i of a group of rows that begins with `row`, in a round of kRoundValues. */
__device__ __forceinline__ Quarter find_quarter(const mv_task &task, int row, int log_per_row, int round, int i) {
    const int per_row = 1 << log_per_row, lane = threadIdx.x % 32;
    const int own_row = row + (4 * i >> log_per_row);
    const int k = round * kRoundValues + (4 * i & (per_row - 1)) * kApart + lane * 8;
    const int left = own_row < task.tokens ? static_cast<int>(task.hidden) - k : 0;
    return {own_row, k, min(4, max(0, (left + kApart - 1) / kApart))};
}

/* s of a quarter: zeros past the end. The residual joins; `store` writes the sum. */
template <typename T>
__device__ __forceinline__ void load_quarter(Packet<T> *s, const mv_task &task, const Quarter &quarter, bool store) {
    const T *x = quarter.of<const T>(task.x);
#pragma unroll
    for (int j = 0; j < 4; j++) s[j] = j < quarter.count ? load_whole(x + j * kApart) : Packet<T>{};
    if (!task.residual.data) return;
    const T *residual = quarter.of<const T>(task.residual);
#pragma unroll
    for (int j = 0; j < 4; j++) {
        if (j >= quarter.count) continue;
        s[j] = add_residual(s[j], load_whole(residual + j * kApart));
        if (store && task.residual_out.data) store_whole(quarter.of<T>(task.residual_out) + j * kApart, s[j]);
    }
}

/* The rows of a group, into rows of y without gaps. */
template <typename T>
__device__ __forceinline__ void normalise_group(const mv_task &task, int row, int log_per_row, int rounds, T *y) {
    const bool hf = task.rounding == MV_ROUNDING_HF;
    const bool narrow = task.norm_weight_dtype == Dtype<T>::value, plain = hf && task.weight_offset == 0;
    Packet<T> s[kHeldPackets];
    float squares[kQuarters] = {};
    for (int round = 0; round < rounds; round++) {
#pragma unroll
        for (int i = 0; i < kQuarters; i++)
            load_quarter(s + 4 * i, task, find_quarter(task, row, log_per_row, round, i), true);
#pragma unroll
        for (int q = 0; q < kHeldPackets; q++)
#pragma unroll
            for (int i = 0; i < 8; i++) squares[q / 4] = fmaf(s[q].get(i), s[q].get(i), squares[q / 4]);
    }
    if (log_per_row >= 3) {
        squares[0] = squares[1] = squares[0] + squares[1];
        squares[2] = squares[3] = squares[2] + squares[3];
    }
    if (log_per_row == 4) squares[0] = squares[1] = squares[2] = squares[3] = squares[0] + squares[2];
    float r[kQuarters];
#pragma unroll
    for (int i = 0; i < kQuarters; i++) r[i] = row_factor<T>(warp_sum(squares[i]), task);
    for (int round = 0; round < rounds; round++) {
#pragma unroll
        for (int i = 0; i < kQuarters; i++) {
            const Quarter quarter = find_quarter(task, row, log_per_row, round, i);
            if (rounds > 1) load_quarter(s + 4 * i, task, quarter, false);
            T *to = y + quarter.row * task.hidden + quarter.k;
            const T *weights = static_cast<const T *>(task.norm_weight) + quarter.k;
            if (narrow) {
                Packet<T> w[4]; /* all on their way before the first is used */
#pragma unroll
                for (int j = 0; j < 4; j++)
                    if (j < quarter.count) w[j] = load_whole(weights + j * kApart);
#pragma unroll
                for (int j = 0; j < 4; j++)
                    if (j < quarter.count)
                        store_whole(to + j * kApart,
                                    plain ? apply_norm_hf(s[4 * i + j], r[i], w[j])
                                          : apply_norm(s[4 * i + j], r[i], widen_norm_weights<T>(task, w[j]), hf));
            } else {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    if (j >= quarter.count) continue;
                    const NormWeights<T> w = wide_norm_weights<T>(task, quarter.k + j * kApart);
                    store_whole(to + j * kApart, apply_norm(s[4 * i + j], r[i], w, hf));
                }
            }
        }
    }
}

/* By whole warps, as many as there are: all rows from counters.first_row on. */
template <typename T>
__device__ __forceinline__ void normalise_rows(const mv_task &task, const RowCounters &counters, T *y) {
    const int hidden = static_cast<int>(task.hidden), tokens = static_cast<int>(task.tokens), lane = threadIdx.x % 32;
    const int log_per_row = hidden <= 1024 ? 2 : hidden <= 2048 ? 3 : 4, rows = kHeldPackets >> log_per_row;
    const int rounds = (hidden + kRoundValues - 1) / kRoundValues;
    const auto take = [&] { return lane == 0 ? static_cast<int>(atomicAdd(counters.taken, rows)) : 0; };
    const auto all = [](int of_first) { return __shfl_sync(0xffffffffu, of_first, 0); };
    int taken = take();
    for (;;) {
        const int row = counters.first_row + all(taken);
        if (row >= tokens) return;
        taken = take(); /* comes while this row is worked on */
        normalise_group(task, row, log_per_row, rounds, y);
        __syncwarp();
        if (lane == 0) add_release(counters.done(row), min(rows, tokens - row));
    }
}
