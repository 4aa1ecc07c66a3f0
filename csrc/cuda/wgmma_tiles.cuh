/* wgmma_tiles.cuh: host: how the tokens and outputs of a projection are cut into tiles for Hopper's tensor cores. */
#pragma once

#include "norm_rows.cuh"
#include "token_tile.cuh"

constexpr int kStep = 64;          /* along hidden */
constexpr unsigned kCluster = 2;   /* CTAs, where there are clusters */
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

/* The tile that takes the fewest microseconds on an H100 (SPEED.md): tiles run in waves, one on each SM, and a tile takes
 * some for each of its steps and some for its outputs. Where waves are many, what a cluster saves in reads of L2 is
 * worth more than its CTAs lose by waiting for each other. */
static inline TileChoice choose_tile(const mv_task *task) {
    constexpr struct {
        int tokens, outputs;
        double step_us;
        bool in_out; /* also for in_out weights, which are rarer */
    } kTiles[] = {{64, 64, 0.20, false},   {128, 64, 0.29, false},  {128, 96, 0.37, false},  {128, 128, 0.45, true},
                  {128, 160, 0.52, false}, {128, 192, 0.60, false}, {128, 224, 0.68, false}, {128, 256, 0.75, true}};
    constexpr double kMeanwhile = 12.5; /* us that a tile must take, for the next rows to be there in time */
    const double steps = static_cast<double>(ceil_div(task->hidden, kStep));
    TileChoice best = {};
    double lowest = 0;
    for (const auto &tile : kTiles) {
        if (task->block[0].col_stride != 1 && !tile.in_out) continue;
        if (tile.tokens < 128 && task->tokens > tile.tokens) continue; /* two of them read the weights twice */
        const int64_t tiles = ceil_div(task->tokens, tile.tokens) * block_columns(task, tile.outputs);
        const int64_t waves = ceil_div(tiles, task->sm_count);
        const double tile_us = steps * tile.step_us + 0.006 * tile.outputs, cost = static_cast<double>(waves) * tile_us;
        if (best.outputs != 0 && cost >= lowest) continue;
        lowest = cost;
        best.tokens = tile.tokens;
        best.outputs = tile.outputs;
        best.cluster = tile.outputs == 256 && waves >= 5 ? kCluster : 1;
        best.meanwhile = tile.outputs >= kSpareOutputs && tile_us >= kMeanwhile;
    }
    best.meanwhile = best.meanwhile && first_rows(task, best) < task->tokens && norm_rows_fit(task) &&
                     !task->batch_invariant; /* they add in another order than the norm kernel */
    return best;
}
