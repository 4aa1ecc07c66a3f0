/* tf32_tiles.cuh: host: how the tokens and outputs of a float32 projection are cut into tiles for Hopper's tensor
 * cores. */
#pragma once

#include "cuda/linear/token_tile.cuh"
#include "cuda/prices/linear.cuh"

constexpr int kTf32Step = 32;   /* along hidden */
constexpr int kFewestSteps = 4; /* of a CTA, where tiles are split */

/* Of a tile: where its products are single ones of TF32, no totals need registers. */
constexpr int tile_outputs(bool once) { return once ? 256 : 128; }

/* How the tokens and outputs of a task are cut. */
struct Tf32TileChoice {
    int tokens, outputs; /* of a tile */
    int64_t whole_tiles, split_tiles, sharers;
    double us; /* of the product */
};

/* In tiles of so many tokens: as many waves of whole tiles as there are; the others are split among so many CTAs that
 * each has the same part of a tile, or among all. */
static inline Tf32TileChoice cut_tiles(const mv_task *task, int tokens) {
    const int outputs = tile_outputs(task->linear.allow_tf32);
    const int64_t rows = ceil_div(task->tokens, tokens), tiles = rows * block_columns(task, outputs);
    const int64_t sms = task->sm_count;
    const int64_t steps = ceil_div(task->hidden, kTf32Step), split = tiles % sms;
    const double step_us = prices::tf32_step_us(task->linear.allow_tf32, tokens);
    const double part_us = prices::tf32_part_us(task->linear.allow_tf32, tokens),
                 weights_us = prices::tf32_read_us(task);
    const auto products_us = [&](int64_t in_a_row, int64_t readings = 1) {
        return prices::larger(static_cast<double>(in_a_row) * step_us, static_cast<double>(readings) * weights_us);
    };
    const int64_t whole = tiles / sms * steps;
    Tf32TileChoice best = {tokens, outputs, tiles - split, split, 0, products_us(whole)};
    const auto consider = [&](int64_t sharers, double parts, int64_t readings = 1) {
        const double us =
            products_us(whole + ceil_div(split * steps, sharers), readings) + (parts > 1 ? parts : 0) * part_us;
        if (best.sharers == 0 || us < best.us) best.sharers = sharers, best.us = us;
    };
    if (split == 0) return best;
    if (task->batch_invariant) { /* unsplit, a sum is the same in every tile */
        consider(split, 1);
        return best;
    }
    const int64_t parts = max(min(sms / split, steps / kFewestSteps), int64_t{1});
    consider(split * parts, static_cast<double>(parts));
    /* Then CTAs are at different places along hidden, and each row of tiles reads the weights from memory. */
    if (tiles > sms) return best;
    const int64_t most = min(sms, ceil_div(split * steps, kFewestSteps));
    consider(most, static_cast<double>(most) / static_cast<double>(split) + 2, rows); /* they do not end together */
    return best;
}

/* The height that takes least; a tile higher than all tokens together is none. */
static inline Tf32TileChoice choose_tf32_tile(const mv_task *task) {
    Tf32TileChoice best = {};
    for (const int tokens : {8, 16, 32, 64, 96, 128}) {
        const Tf32TileChoice choice = cut_tiles(task, tokens);
        if (best.tokens == 0 || choice.us < best.us) best = choice;
        if (tokens >= task->tokens) break;
    }
    return best;
}
