/* token_tile.cuh: what a CTA of the projection does about its tokens: the order of the tiles, the row statistic, the
 * normalised values. Shared by the tensor core and the CUDA core kernels. */
#pragma once

#include "../kernel.h"
#include "qkv_epilogue.cuh"
#include "reduce.cuh"
#include "vec.cuh"

/* The tile of a CTA: 2,048 tokens at a time walk over all outputs. Those tokens stay in L2 (32 MB at hidden 8192) and
 * the CTAs that run together form a block about as high as wide, so both operands are read from memory few times. */
struct TilePlace {
    int64_t first_token, first_output;
};

template <int kTokens, int kOutputs> __device__ __forceinline__ TilePlace find_tile(const mv_task &task) {
    constexpr int kGroup = 2048 / kTokens;
    const int64_t token_tiles = (task.tokens + kTokens - 1) / kTokens;
    const int64_t output_tiles = (task.outputs + kOutputs - 1) / kOutputs;
    const int64_t group = blockIdx.x / (kGroup * output_tiles), place = blockIdx.x % (kGroup * output_tiles);
    const int64_t left = token_tiles - group * kGroup, height = left < kGroup ? left : kGroup;
    return {(group * kGroup + place % height) * kTokens, (place / height) * kOutputs};
}

/* s: x, or the rounded sum of x and the residual. */
template <typename T> __device__ __forceinline__ T add_residual(T x, T residual) {
    return from_float<T>(to_float(x) + to_float(residual));
}

/* y, from s, r and offset + weight. */
template <typename T> __device__ __forceinline__ T normalise(T s, float r, float weight, bool hf) {
    const float scaled = to_float(s) * r;
    return from_float<T>((hf ? round_to<T>(scaled) : scaled) * weight);
}

/* r of the kRows rows from `first` on, into shared memory, by all kThreads threads; 0 past the last row. A warp takes a
 * row, a lane every 32nd packet of it, so the order of the sum depends on hidden alone: not on the tile, the alignment
 * or the other rows. With `store` residual_out is written on the way. */
template <typename T, int kRows, int kThreads>
__device__ __forceinline__ void tile_row_scales(const mv_task &task, int64_t first, bool store, float *scale) {
    constexpr int kSize = Packet<T>::size;
    const int lane = threadIdx.x % 32;
    for (int row = threadIdx.x / 32; row < kRows; row += kThreads / 32) {
        const int64_t token = first + row;
        if (token >= task.tokens) {
            if (lane == 0) scale[row] = 0;
            continue;
        }
        const T *x = row_address<const T>(task.x, task.inner, token);
        const T *residual = task.residual.data ? row_address<const T>(task.residual, task.inner, token) : nullptr;
        T *sums = store && residual ? row_address<T>(task.residual_out, task.inner, token) : nullptr;
        const bool x_aligned = reinterpret_cast<uintptr_t>(x) % 16 == 0;
        const bool residual_aligned = reinterpret_cast<uintptr_t>(residual) % 16 == 0;
        const bool sums_aligned = reinterpret_cast<uintptr_t>(sums) % 16 == 0;

        float squares[kSize] = {};
#pragma unroll 4
        for (int64_t k = lane * kSize; k < task.hidden; k += 32 * kSize) {
            Packet<T> s = load_packet(x + k, task.hidden - k, x_aligned);
            if (residual) {
                const Packet<T> other = load_packet(residual + k, task.hidden - k, residual_aligned);
#pragma unroll
                for (int i = 0; i < kSize; i++) s.v[i] = add_residual(s.v[i], other.v[i]);
                if (sums) store_packet(sums + k, s, task.hidden - k, sums_aligned);
            }
#pragma unroll
            for (int i = 0; i < kSize; i++) squares[i] = fmaf(to_float(s.v[i]), to_float(s.v[i]), squares[i]);
        }
#pragma unroll
        for (int step = kSize / 2; step > 0; step /= 2)
#pragma unroll
            for (int i = 0; i < step; i++) squares[i] += squares[i + step];
        const float sum = warp_sum(squares[0]);
        if (lane == 0) scale[row] = 1.0f / sqrtf(sum / static_cast<float>(task.hidden) + task.eps);
    }
}

/* ---- host: the choice of the tile ------------------------------------------------------------------------------ */

static inline int64_t tile_count(const mv_task *task, int tokens, int outputs) {
    return ((task->tokens + tokens - 1) / tokens) * ((task->outputs + outputs - 1) / outputs);
}
