/* wgmma_tiles.cuh: host: how the tokens and outputs of a projection are cut into tiles for Hopper's tensor cores. */
#pragma once

#include "norm_rows.cuh"
#include "token_tile.cuh"

constexpr int kStep = 64;          /* along hidden */
constexpr unsigned kCluster = 2;   /* CTAs, where there are clusters */
constexpr int kVeryFew = 16;       /* tokens */
constexpr int kSpareOutputs = 128; /* tiles of so many have three warps more, that may normalise rows meanwhile */

struct TileChoice {
    int tokens, outputs; /* of a tile */
    unsigned cluster;    /* 1 or kCluster */
    bool meanwhile;      /* spare warps normalise the rows behind the first wave's */
};

/* Rows of y in the workspace. */
static inline int64_t padded_tokens(const mv_task *task) {
    constexpr int64_t kWhole = 128 * kCluster;
    return ceil_div(task->tokens, kWhole) * kWhole;
}

/* Rows of tiles that walk over all columns together: 2,048 tokens high, so that both operands are read from memory few
 * times; as high as the first wave when the rows behind it are normalised meanwhile, but at least 512 tokens. */
static inline unsigned group_height(const mv_task *task, const TileChoice &choice) {
    const int64_t most = 2048 / choice.tokens, least = 512 / choice.tokens;
    const int64_t wave = ceil_div(task->sm_count, block_columns(task, choice.outputs));
    const int64_t tiles = !choice.meanwhile ? most : wave < least ? least : wave;
    return static_cast<unsigned>(ceil_div(tiles, choice.cluster));
}

/* The rows of the first group. */
static inline int64_t first_rows(const mv_task *task, const TileChoice &choice) {
    return int64_t{group_height(task, choice)} * choice.cluster * choice.tokens;
}

/* The tile that takes the fewest microseconds on an H100 (SPEED.md): tiles run in waves, one on each SM, and a tile
 * takes some for each of its steps and some for its outputs. 64 tokens high only where that is enough: two such rows of
 * tiles would read the weights twice; and not for batch_invariant, because they add in another order. Very few tokens
 * ask so little of L2 that more, narrower tiles pay where hidden is long, and so they do where it is short and most SMs
 * had no tile. Where L2 does not hold what is multiplied, a cluster saves more by reading less than its CTAs lose by
 * waiting for each other. Rows are normalised meanwhile where there are waves enough for that. */
static inline TileChoice choose_tile(const mv_task *task) {
    constexpr double kMeanwhile = 12.5; /* us that a tile must take, for the next rows to be there in time */
    constexpr int64_t kMeanwhileWaves = 5, kClusterWaves = 4;
    constexpr double kFewSteps = 16, kManySteps = 48;
    const double steps = static_cast<double>(ceil_div(task->hidden, kStep));
    const bool in_out = task->block[0].col_stride != 1, few = task->tokens <= 64 && !in_out && !task->batch_invariant;
    const int apart = in_out ? 128 : 16; /* few tiles for the rarer layout */
    const double bytes = 2.0 * static_cast<double>((task->tokens + task->outputs) * task->hidden);
    const bool overflows = 3 * bytes > 4.0 * task->l2_bytes;
    TileChoice best = {};
    double lowest = 1e300;
    const bool idle = steps <= kFewSteps && 3 * block_columns(task, 64) <= task->sm_count;
    const int least = in_out ? 128 : few && (idle || (task->tokens <= kVeryFew && steps >= kManySteps)) ? 32 : 64;
    for (int outputs = few ? 96 : 256; outputs >= least; outputs -= apart) {
        const int tokens = few ? 64 : 128;
        const int64_t waves = ceil_div(ceil_div(task->tokens, tokens) * block_columns(task, outputs), task->sm_count);
        const double step_us = few ? 0.05 + 0.0024 * outputs : 0.05 + 0.003 * outputs;
        const double tile_us = steps * step_us + 0.006 * outputs;
        const double cost = static_cast<double>(waves) * tile_us;
        if (cost >= 0.99 * lowest) continue; /* wide ones ask less of L2 */
        lowest = cost;
        const unsigned cluster = overflows && waves >= kClusterWaves ? kCluster : 1;
        const bool meanwhile = outputs >= kSpareOutputs && tile_us >= kMeanwhile && waves >= kMeanwhileWaves;
        best = {tokens, outputs, cluster, meanwhile};
    }
    best.meanwhile = best.meanwhile && first_rows(task, best) < task->tokens && norm_rows_fit(task) &&
                     !task->batch_invariant; /* they add in another order than the norm kernel */
    return best;
}
