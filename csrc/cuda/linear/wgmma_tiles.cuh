/* wgmma_tiles.cuh: host: how the tokens and outputs of a projection are cut into tiles for Hopper's tensor cores. */
#pragma once

#include "cuda/linear/token_tile.cuh"
#include "cuda/norm/norm_rows.cuh"
#include "cuda/prices/linear.cuh"

constexpr int kStep = 64;        /* along hidden */
constexpr unsigned kCluster = 2; /* CTAs, where there are clusters */
constexpr int kVeryFew = 32;     /* tokens */
/* Of a tile that one warpgroup has for itself. A gated layer's may be narrower: then the warpgroup has registers to
 * finish several outputs at once, each of which waits for exp and a reciprocal. */
constexpr int kWholeOutputs = 192, kNarrowWholeOutputs = 160;

/* What the two warpgroups of a CTA share: a tile's tokens, the steps along hidden of a tile of 64 tokens, or the tiles:
 * each has every second one for itself. */
enum class Sharing { kTokens, kSteps, kTiles };

constexpr int tile_tokens(Sharing sharing) { return sharing == Sharing::kSteps ? 64 : 128; }

/* Of a CTA whose tiles are these: three warps more, that may normalise rows meanwhile. */
constexpr bool has_spare_warps(Sharing sharing, int outputs) {
    return sharing == Sharing::kTiles || (sharing == Sharing::kTokens && outputs >= 224);
}

struct WgmmaTileChoice {
    Sharing sharing;
    int outputs;      /* of a tile */
    unsigned cluster; /* 1 or kCluster */
    bool meanwhile;   /* spare warps normalise the rows behind the first wave's */
    double us;        /* that all tiles take, with the norm that nothing hides */
};

/* Rows of y in the workspace. */
static inline int64_t padded_tokens(const mv_task *task) {
    constexpr int64_t kWhole = 128 * kCluster;
    return ceil_div(task->tokens, kWhole) * kWhole;
}

/* Rows of tiles that walk over all columns together: 2,048 tokens high, so that both operands are read from memory few
 * times; as high as the first wave when the rows behind it are normalised meanwhile, but at least 512 tokens. */
static inline unsigned group_height(const mv_task *task, const WgmmaTileChoice &choice) {
    const int64_t most = 2048 / tile_tokens(choice.sharing), least = 512 / tile_tokens(choice.sharing);
    const int64_t wave = ceil_div(task->sm_count, block_columns(task, choice.outputs));
    const int64_t tiles = !choice.meanwhile ? most : wave < least ? least : wave;
    return static_cast<unsigned>(ceil_div(tiles, choice.cluster));
}

/* The rows of the first group. */
static inline int64_t first_rows(const mv_task *task, const WgmmaTileChoice &choice) {
    return int64_t{group_height(task, choice)} * choice.cluster * tile_tokens(choice.sharing);
}

/* So many tiles does an SM compute, one after the other. */
static inline int64_t waves_of(const mv_task *task, const WgmmaTileChoice &choice) {
    const int64_t rows = ceil_div(task->tokens, tile_tokens(choice.sharing) * int64_t{choice.cluster});
    return ceil_div(rows * block_columns(task, choice.outputs),
                    max(int64_t{task->sm_count / choice.cluster}, int64_t{1}));
}

/* Clusters where L2 does not hold what is multiplied: they save more by reading less than their CTAs lose by waiting
 * for each other. Rows are normalised meanwhile where a tile takes long enough for those of the next ones to be there
 * in time, and where that saves more than the first ones are late. Whole tiles need clusters for it: groups of few rows
 * of tiles read the weights from L2 more often. */
static inline WgmmaTileChoice finish_choice(const mv_task *task, WgmmaTileChoice choice, double tile_us) {
    constexpr int64_t kClusterWaves = 4;
    const double bytes = 2.0 * static_cast<double>((task->tokens + task->linear.outputs) * task->hidden);
    const bool whole = choice.sharing == Sharing::kTiles;
    choice.cluster = 3 * bytes > 4.0 * task->l2_bytes && waves_of(task, choice) >= kClusterWaves ? kCluster : 1;
    WgmmaTileChoice meanwhile = choice;
    meanwhile.meanwhile = true;
    if (whole) meanwhile.cluster = kCluster;
    const bool pays = has_spare_warps(choice.sharing, choice.outputs) && tile_us >= prices::kMeanwhileTile &&
                      prices::norm_us(task, task->tokens - first_rows(task, meanwhile)) > prices::kMeanwhileLate &&
                      norm_rows_fit(task) && !task->linear.plain_x &&
                      !task->batch_invariant; /* they add in another order than the norm kernel */
    return pays ? meanwhile : choice;
}

/* The tile that takes the fewest microseconds: tiles run in waves, one on each
 * SM, and a tile takes some for each of its steps and some for its outputs. 64 tokens high only where that is enough:
 * two such rows of tiles would read the weights twice; and not for batch_invariant, because they add in another order.
 * Very few tokens
 * ask so little of L2 that more, narrower tiles pay where hidden is long, and so they do where it is short and most SMs
 * had no tile; somewhat narrower ones where a third had none. From two waves on, whole tiles: while one is stored, the
 * next one is multiplied. */
static inline WgmmaTileChoice choose_wgmma_tile(const mv_task *task) {
    constexpr double kFewSteps = 16, kManySteps = 40;
    const double steps = static_cast<double>(ceil_div(task->hidden, kStep));
    const bool in_out = task->linear.block[0].col_stride != 1,
               few = task->tokens <= 64 && !in_out && !task->batch_invariant;
    /* Fewer tiles for the rarer layout, and for the pairs of a gated layer. */
    const int apart = in_out ? 128 : task->linear.gated ? 32 : 16;
    const int64_t busy = block_columns(task, 64);
    const bool idle = steps <= kFewSteps && 3 * busy <= task->sm_count;
    const bool narrow = few && (idle || (task->tokens <= kVeryFew && steps >= kManySteps));
    const int least = in_out ? 128 : narrow ? 32 : few && 3 * busy <= 2 * task->sm_count ? 48 : 64;
    WgmmaTileChoice best = {};
    double lowest = 1e300, best_us = 0;
    for (int outputs = few ? 96 : 256; outputs >= least; outputs -= apart) {
        const WgmmaTileChoice choice = {few ? Sharing::kSteps : Sharing::kTokens, outputs, 1, false, 0};
        const double step_us = few ? prices::wgmma_few_step_us(outputs) : prices::wgmma_step_us(outputs);
        const double tile_us = steps * step_us + prices::wgmma_store_us(outputs);
        const double cost = static_cast<double>(waves_of(task, choice)) * tile_us;
        if (cost >= 0.99 * lowest) continue; /* wide ones ask less of L2 */
        lowest = cost;
        best = choice;
        best_us = tile_us;
    }
    best = finish_choice(task, best, best_us);
    const auto with_norm = [&](WgmmaTileChoice choice, double us) {
        choice.us = us + prices::norm_us(task, choice.meanwhile ? first_rows(task, choice) : task->tokens);
        return choice;
    };
    best = with_norm(best, lowest);
    if (few || in_out) return best;
    for (const int outputs : {kWholeOutputs, kNarrowWholeOutputs}) {
        if (outputs != kWholeOutputs && !task->linear.gated) break;
        const double tile_us = prices::wgmma_whole_tile_us(task, steps, outputs);
        WgmmaTileChoice whole = finish_choice(task, {Sharing::kTiles, outputs, 1, false, 0}, tile_us);
        const int64_t waves = waves_of(task, whole);
        whole = with_norm(whole, static_cast<double>(waves) * tile_us + prices::wgmma_store_us(whole.outputs));
        if (waves > 1 && whole.us < 0.99 * best.us) best = whole;
    }
    return best;
}

/* The same where the row factor joins late. No clusters: multiply_late gives slots back to one CTA. */
static inline WgmmaTileChoice choose_late_tile(const mv_task *task) {
    const double steps = static_cast<double>(ceil_div(task->hidden, kStep));
    WgmmaTileChoice best = {};
    for (int outputs = 256; outputs >= 64; outputs -= 32) {
        WgmmaTileChoice choice = {Sharing::kTokens, outputs, 1, false, 0};
        choice.us = static_cast<double>(waves_of(task, choice)) * (steps * prices::wgmma_late_step_us(outputs) + 1);
        if (best.outputs == 0 || choice.us < 0.99 * best.us) best = choice;
    }
    return best;
}

/* What the plan takes with these tiles. */
static inline double wgmma_plan_us(const mv_task *task, const WgmmaTileChoice &choice) {
    const prices::WgmmaRun run = {static_cast<double>(waves_of(task, choice)),
                                  static_cast<double>(ceil_div(task->hidden, kStep)),
                                  static_cast<double>(choice.outputs),
                                  choice.meanwhile ? min(first_rows(task, choice), task->tokens) : task->tokens};
    return choice.sharing == Sharing::kSteps ? prices::norm_wgmma_few_us(task, run)
                                             : prices::norm_wgmma_us(task, run, choice.sharing == Sharing::kTiles);
}
