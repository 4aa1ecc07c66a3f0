/* linear.cuh: host: what the rows of the linear layers take on a GPU, in microseconds, and the figures by which they
 * choose their tiles. A price is the launches, then the larger of the weights at the memory's speed and of the tiles,
 * of which each SM has some, one after the other; where both are near each other, more than either. The rows of 16 bits
 * were measured on an H100 and an H200, the others on an H100 (docs/speed, SPEED.md). */
#pragma once

#include "cuda/prices/memory.cuh"

namespace prices {

static inline double weight_bytes(const mv_task *t) {
    return static_cast<double>(t->linear.outputs) * static_cast<double>(t->hidden) *
           static_cast<double>(mv_dtype_bytes(t->linear.weight_dtype));
}

/* Reading the weights. */
static inline double read_us(const mv_task *t) { return weight_bytes(t) / memory_rate(t); }

/* Of tiles that are so many tokens high. */
static inline double tile_flops(const mv_task *t, double tokens) {
    return 2 * larger(static_cast<double>(t->tokens), tokens) * static_cast<double>(t->linear.outputs) *
           static_cast<double>(t->hidden);
}

/* The norm kernel, for so many tokens of 16 bits that come from memory. */
static inline double norm_us(const mv_task *t, int64_t tokens) {
    return 4.0 * static_cast<double>(tokens) * static_cast<double>(t->hidden) / 2.7e6;
}

/* What a price has for each way that a product begins and ends. */
struct ByEnd {
    double plain, addend, norm, gated;
    double of(const mv_linear_layer &layer) const {
        return layer.gated ? gated : !layer.plain_x ? norm : layer.addend.data ? addend : plain;
    }
};

/* ---- few tokens ------------------------------------------------------------------------------------------------- */

/* It takes 4 tokens at a time, each of which it normalises first. */
static inline double decode_sm80_us(const mv_task *t) {
    const double rounds = static_cast<double>((t->tokens + 3) / 4), hidden = static_cast<double>(t->hidden);
    return (t->linear.plain_x ? 0.35 : 1) * static_cast<double>(t->tokens) +
           rounds * (1.2 + 0.4e-3 * hidden + 1.06 * read_us(t));
}

/* How the tokens of a task are shared. */
struct DecodeRun {
    double token_bytes; /* of a block, which normalises them where there is a norm, before it multiplies */
    bool grouped;       /* blocks have some of the tokens only */
    bool resident; /* they have all of them, and room for all their weights, which come while they wait for those */
};

/* The tokens take a part of a block's shared memory from the weights; the larger, the less are on their way. */
static inline double decode_sm90a_us(const mv_task *t, const DecodeRun &run) {
    const bool plain = t->linear.plain_x;
    const double several = run.grouped ? (plain ? 0.5 : 1.2) : t->tokens > 8 && !run.resident ? 1.2 : 0;
    const double part = run.token_bytes / 100e3, tokens = part * (plain ? 1.15 : 3.8);
    const double weights = (1.014 + 0.0175 * part * part) * read_us(t);
    return (plain ? 1.15 : 0.95) + several + (run.resident ? together(weights, tokens) : weights + tokens);
}

static inline double norm_few_us(const mv_task *t) {
    const double ends = 1 + 300 / static_cast<double>(t->hidden); /* of tiles: what short rows do not hide */
    const double weights = 1.06 * read_us(t), products = tile_flops(t, 8) / 3.6e7 * ends;
    const double most = larger(weights, products), least = weights + products - most;
    return 4 + most + 0.15 * least * least / most; /* they get in each other's way */
}

/* A tile of the CUDA cores for few tokens: in each of its `steps` steps of `step` columns the weights and tokens at an
 * SM's share of what memory and L2 give, or its products at three quarters of what the cores can. */
static inline double few_tile_us(int tokens, int outputs, int step, double steps) {
    const double copies = (outputs / 22e3 + tokens / 60e3) * step * 4, products = tokens * outputs * step / 160e3;
    return 1 + (0.02 + larger(copies, products)) * steps;
}

/* ---- mma.sync --------------------------------------------------------------------------------------------------- */

/* 64 columns of a tile, alone on an SM or beside others that then take their time one after the other. */
constexpr double mma_step_us(int tokens, int outputs) {
    return tokens == 32     ? 0.205
           : outputs == 256 ? 1.15
           : tokens == 128  ? (outputs == 128 ? 0.60 : 0.485)
           : outputs == 128 ? 0.37
           : outputs == 96  ? 0.31
                            : 0.245;
}

/* An SM has `share` tiles, and each takes its steps and, where no other shares the SM, about two more to begin and to
 * end. One that is alone where `room` would fit waits more (docs/speed/mma_sync.md). */
static inline double mma_tiles_us(int tokens, int outputs, int room, double steps, int64_t share) {
    const double in_turn = share < room && share == 1 ? 1.15 : static_cast<double>(share);
    return in_turn * (steps + 2.0 / room) * mma_step_us(tokens, outputs);
}

/* tiles_us: as above. stored: the outputs of a tile, in thousands. Nothing hides the norm, nor the addends of an SM's
 * last tile, nor any activation. Where an SM has several tiles, memory is idle for a while between two of them, and
 * each waits for tokens. */
static inline double norm_mma_us(const mv_task *t, double tiles_us, double stored, int64_t share) {
    const mv_linear_layer &layer = t->linear;
    const double tiles = static_cast<double>(share), norm = layer.plain_x ? 0 : 1.5 * norm_us(t, t->tokens);
    const double end = layer.gated ? 0.37 * stored * tiles : (layer.addend.data ? 0.66 : 0.06) * stored;
    double weights = 1.04 * read_us(t);
    if (share > 1) {
        const int64_t tokens = t->tokens < 64 ? t->tokens : 64;
        weights = 1.03 * read_us(t) + 0.13 * tiles_us + tiles * 2 * static_cast<double>(tokens * t->hidden) / 400e3;
    }
    constexpr ByEnd kStart = {1.3, 1.6, 3.0, 3.75};
    return kStart.of(layer) + norm + end + together(weights, 0.93 * tiles_us);
}

/* ---- wgmma ------------------------------------------------------------------------------------------------------ */

/* By these the tiles are chosen (docs/speed/many_tokens.md): 64 columns of a tile whose warpgroups share the steps, or
 * the tokens; of a tile of one warpgroup; where the row factor joins late, what its copies take, some 64 bytes a ns,
 * and 17 % more than was measured, so that this is not chosen where both are equal; and storing a tile. */
static inline double wgmma_few_step_us(int outputs) { return 0.05 + 0.0024 * outputs; }
static inline double wgmma_step_us(int outputs) { return 0.05 + 0.003 * outputs; }
static inline double wgmma_whole_step_us(double outputs) { return 0.62 * (128 + outputs) / 320; }
static inline double wgmma_late_step_us(int outputs) { return 0.28 + 0.0024 * outputs; }
static inline double wgmma_store_us(int outputs) { return 0.006 * outputs; }

/* Finishing a tile of one warpgroup of a gated layer: the sums of a wide one leave it registers for one output at a
 * time. */
static inline double wgmma_gated_end_us(double outputs) { return outputs > 160 ? 13 : 3; }

/* How far apart two such tiles are: one is finished while the other warpgroup multiplies. */
static inline double wgmma_whole_tile_us(const mv_task *t, double steps, double outputs) {
    const double products = wgmma_whole_step_us(outputs) * steps;
    return t->linear.gated ? larger(products, (products + wgmma_gated_end_us(outputs)) / 2) : products;
}

/* Rows are normalised meanwhile where a tile takes so long, and the rows of later waves longer than the first ones are
 * late. */
constexpr double kMeanwhileTile = 9.5, kMeanwhileLate = 7;

/* The hop between two launches, which the late form saves. */
constexpr double kHop = 1.5;

/* How the tiles of a task run: so many waves of tiles of so many steps and outputs; rows that the norm kernel has
 * before the first wave begins. */
struct WgmmaRun {
    double waves, steps, outputs;
    int64_t first_rows;
};

/* At least: it reads the weights. */
static inline double norm_wgmma_least_us(const mv_task *t) {
    constexpr ByEnd kStart = {0.65, 0.45, 1.95, 2.15};
    return kStart.of(t->linear) + 1.018 * read_us(t);
}

/* Two warpgroups take the steps of a tile in turns. A step takes what their barriers do, whatever its width; and in
 * each wave all blocks read all tokens. */
static inline double norm_wgmma_few_us(const mv_task *t, const WgmmaRun &run) {
    constexpr ByEnd kStart = {1.1, 2.6, 1.95, 2.15};
    const double tokens = run.waves * 2.0 * static_cast<double>(t->tokens * t->hidden) / 317e3;
    const double tiles = run.waves * (0.0666 * run.steps + 0.0131 * run.outputs);
    return kStart.of(t->linear) + tokens + together(1.018 * read_us(t), tiles);
}

/* Tiles of 128 tokens. Addends and activations of a tile of two warpgroups come on top of its steps; where each
 * warpgroup has tiles of its own (whole), one finishes its tile while the other multiplies. In the waves of a single
 * row of tiles memory runs on from one to the next. */
static inline double norm_wgmma_us(const mv_task *t, const WgmmaRun &run, bool whole) {
    constexpr ByEnd kStart = {0.65, 0.45, 2.05, 3.0}, kEnd = {0.004, 0.045, 0.004, 0.01},
                    kWholeEnd = {0.004, 0.059, 0.004, 0};
    const double steps = run.steps * (whole ? 0.91 * wgmma_whole_step_us(run.outputs) : 0.01 + 0.0028 * run.outputs);
    const double end = whole && t->linear.gated ? wgmma_gated_end_us(run.outputs)
                                                : (whole ? kWholeEnd : kEnd).of(t->linear) * run.outputs;
    const double tile = whole ? larger(steps, (steps + end) / 2) : steps + end;
    const double norm = t->linear.plain_x ? 0 : 0.76 * norm_us(t, run.first_rows);
    const double weights = 1.07 * read_us(t), tiles = run.waves * tile + (whole ? end : 0),
                 most = larger(weights, tiles);
    const double in_the_way = (together(weights, tiles) - most) / (t->tokens <= 128 ? run.waves : 1);
    return kStart.of(t->linear) + norm + most + in_the_way;
}

/* ---- float32 and the CUDA cores --------------------------------------------------------------------------------- */

/* A tile's 32 columns, in one product of TF32 or in three, and, of a part of a tile, writing and reading its sums
 * (docs/speed/float32.md). */
static inline double tf32_step_us(bool once, int tokens) {
    return once ? 0.34 + 0.0042 * tokens : 0.47 + 0.0039 * tokens;
}
static inline double tf32_part_us(bool once, int tokens) { return 0.15 + (once ? 0.029 : 0.024) * tokens; }

/* What the weights take where the blocks read them once. */
static inline double tf32_read_us(const mv_task *t) { return 1.155 * read_us(t); }

static inline double norm_3xtf32_us(const mv_task *t, double product_us) {
    const double norm = static_cast<double>(t->tokens * t->hidden) * 12 / 2.7e6; /* y is twice as large as x */
    return 3.2 + norm + product_us;
}

/* The CUDA cores cannot be faster than one tile is along the hidden size; values of 16 bits they convert first. */
static inline double ffma_us(const mv_task *t) {
    const bool narrow = t->dtype != MV_F32;
    return 20 + larger(static_cast<double>(t->hidden) * (narrow ? 0.13 : 0.08),
                       tile_flops(t, 64) / (narrow ? 1.8e7 : 2.2e7));
}
static inline double norm_ffma_us(const mv_task *t) {
    const int64_t tiles = (t->tokens + 63) / 64 * ((t->linear.outputs + 63) / 64);
    const double turns = static_cast<double>((tiles + t->sm_count - 1) / t->sm_count);
    const double slower = t->dtype != MV_F32 ? 1.64 : 1;
    return 5 + slower * static_cast<double>(t->hidden) * larger(0.056, turns * 64 * 64 * 2 / 2.9e5);
}

} // namespace prices
