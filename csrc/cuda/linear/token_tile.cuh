/* token_tile.cuh: what a CTA of the projection of many tokens does before it multiplies: it finds its tile and, on the
 * CUDA cores, computes the statistic of its rows; and how many tiles there are. */
#pragma once

#include "cuda/arch/reduce.cuh"
#include "cuda/arch/vec.cuh"
#include "cuda/norm/rms_norm.cuh"
#include "kernel.h"

/* The order of tiles: `group` rows of them at a time walk over all columns. Those tokens stay in L2 (2,048 are 32 MB at
 * hidden 8192) and the tiles that run together form a block about as high as wide, so both operands are read from
 * memory few times. 32 bits: a launch has no more than 2^31 tiles. kSkipsDivision: a tile of the first group
 * is found by one division, not two. */
struct TileIndex {
    unsigned row, column;
};

template <bool kSkipsDivision = false>
__device__ __forceinline__ TileIndex index_tile(unsigned tile, unsigned rows, unsigned columns, unsigned group) {
    const unsigned group_tiles = min(group, rows) * columns;
    unsigned first = 0, within = tile;
    if (!kSkipsDivision || tile >= group_tiles) first = tile / group_tiles * group, within = tile % group_tiles;
    const unsigned height = min(group, rows - first);
    return {first + within % height, within / height};
}

/* The tile of a CTA, its outputs counted over all blocks of the task. */
struct TilePlace {
    int64_t first_token, first_output;
};

template <int kTokens, int kOutputs> __device__ __forceinline__ TilePlace find_tile(const mv_task &task) {
    const unsigned rows = static_cast<unsigned>((task.tokens + kTokens - 1) / kTokens);
    const unsigned columns = static_cast<unsigned>((task.linear.outputs + kOutputs - 1) / kOutputs);
    const TileIndex index = index_tile(blockIdx.x, rows, columns, 2048 / kTokens);
    return {int64_t{index.row} * kTokens, int64_t{index.column} * kOutputs};
}

/* r of the kRows rows from `first` on, into shared memory, by all kThreads threads; 0 past the last row. A warp takes a
 * row, a lane every 32nd packet of it, so the order of the sum depends on hidden alone: not on the tile, the alignment
 * or the other rows. With `store` residual_out is written on the way. */
template <typename T, int kRows, int kThreads>
__device__ __forceinline__ void tile_row_scales(const mv_task &task, int64_t first, bool store, float *scale) {
    constexpr int kSize = Packet<T>::size, kStep = 32 * kSize, kAhead = 4;
    const int lane = threadIdx.x % 32;
    for (int row = threadIdx.x / 32; row < kRows; row += kThreads / 32) {
        const int64_t token = first + row;
        if (token >= task.tokens) {
            if (lane == 0) scale[row] = 0;
            continue;
        }
        const T *x = row_address<const T>(task.x, task.inner, token);
        const T *residual =
            task.norm.residual.data ? row_address<const T>(task.norm.residual, task.inner, token) : nullptr;
        T *sums =
            store && task.norm.residual_out.data ? row_address<T>(task.norm.residual_out, task.inner, token) : nullptr;
        const bool x_aligned = reinterpret_cast<uintptr_t>(x) % 16 == 0;
        const bool residual_aligned = reinterpret_cast<uintptr_t>(residual) % 16 == 0;
        const bool sums_aligned = reinterpret_cast<uintptr_t>(sums) % 16 == 0;

        float squares[kSize] = {};
        for (int64_t k = lane * kSize; k < task.hidden; k += kAhead * kStep) {
            Packet<T> s[kAhead], other[kAhead]; /* all of them on their way before the first is used */
#pragma unroll
            for (int i = 0; i < kAhead; i++) {
                const int64_t at = k + i * kStep, count = task.hidden - at;
                s[i] = load_packet(x + at, count, x_aligned);
                if (residual) other[i] = load_packet(residual + at, count, residual_aligned);
            }
#pragma unroll
            for (int i = 0; i < kAhead; i++) {
                const int64_t at = k + i * kStep;
                if (residual) s[i] = add_residual(s[i], other[i]);
                if (sums) store_packet(sums + at, s[i], task.hidden - at, sums_aligned);
#pragma unroll
                for (int j = 0; j < kSize; j++) squares[j] = fmaf(s[i].get(j), s[i].get(j), squares[j]);
            }
        }
#pragma unroll
        for (int step = kSize / 2; step > 0; step /= 2)
#pragma unroll
            for (int i = 0; i < step; i++) squares[i] += squares[i + step];
        const float sum = warp_sum(squares[0]);
        if (lane == 0) scale[row] = row_factor<T>(sum, task);
    }
}

/* ---- host ------------------------------------------------------------------------------------------------------ */

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* The shared memory to ask for, for so many blocks of which an SM could hold ctas_per_sm, so that none gets more than
 * its share: with more than they need, others find no room beside them. */
static inline size_t spread_blocks(const mv_task *task, int64_t blocks, int ctas_per_sm, size_t needed) {
    const int64_t share = ceil_div(blocks, task->sm_count);
    const size_t alone = share < ctas_per_sm ? static_cast<size_t>(task->smem_bytes / (share + 1)) + 1024 : 0;
    return alone > needed ? alone : needed;
}

/* Tiles of this size. */
static inline int64_t tile_count(const mv_task *task, int tokens, int outputs) {
    return ceil_div(task->tokens, tokens) * ceil_div(task->linear.outputs, outputs);
}

/* Columns of tiles when no tile has outputs of two matrices. */
static inline int64_t block_columns(const mv_task *task, int outputs) {
    if (task->linear.packed || task->linear.gated) return ceil_div(task->linear.outputs, outputs);
    int64_t columns = 0;
    for (const mv_block &block : task->linear.block) columns += ceil_div(block.outputs, outputs);
    return columns;
}
