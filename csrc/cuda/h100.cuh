/* h100.cuh: host: what the products take on an H100, in microseconds (SPEED.md): the figures that the choice among
 * them goes by. Each is launches, and the larger of the weights at the kernel's share of memory speed and the products
 * at its rate. The tiles of a product have figures of their own, beside them. */
#pragma once

#include "../kernel.h"

namespace h100 {

static inline double larger(double a, double b) { return a > b ? a : b; }

static inline double weight_bytes(const mv_task *t) {
    return static_cast<double>(t->linear.outputs) * static_cast<double>(t->hidden) *
           static_cast<double>(mv_dtype_bytes(t->linear.weight_dtype));
}

/* Of tiles that are so many tokens high. */
static inline double tile_flops(const mv_task *t, double tokens) {
    return 2 * larger(static_cast<double>(t->tokens), tokens) * static_cast<double>(t->linear.outputs) *
           static_cast<double>(t->hidden);
}

/* It takes 4 tokens at a time. */
static inline double decode_sm80_us(const mv_task *t) {
    return 1.5 * static_cast<double>(t->tokens) +
           static_cast<double>((t->tokens + 3) / 4) * (1.7 + weight_bytes(t) / 3.0e6);
}

/* missed: microseconds in which weights should be on their way, but the tokens of a block are in their room. */
static inline double decode_sm90a_us(const mv_task *t, double missed) {
    return 0.6 + weight_bytes(t) / 2.97e6 + larger(missed, 0);
}

static inline double norm_mma_us(const mv_task *t) {
    return 6 + larger(weight_bytes(t) / 2.4e6, tile_flops(t, 32) / 4.3e8);
}

/* The weights are on their way while the norm runs; small ones are there before it is done, and wait for it. */
static inline double norm_wgmma_us(const mv_task *t) {
    const double waits = larger(1 - weight_bytes(t) / 20e6, 0);
    return 1 + 2 * waits + larger(weight_bytes(t) / 2.93e6, tile_flops(t, 128) / 6.2e8);
}

static inline double norm_3xtf32_us(const mv_task *t, double product_us) {
    const double norm_us = static_cast<double>(t->tokens * t->hidden) * 12 / 2.7e6; /* y is twice as large as x */
    return 3.2 + norm_us + product_us;
}

static inline double norm_few_us(const mv_task *t) {
    const double ends = 1 + 300 / static_cast<double>(t->hidden); /* of tiles: what short rows do not hide */
    const double weights = weight_bytes(t) / 2.95e6, products = tile_flops(t, 8) / 3.6e7 * ends;
    const double most = larger(weights, products), least = weights + products - most;
    return 4 + most + 0.15 * least * least / most; /* they get in each other's way */
}

/* The CUDA cores cannot be faster than one tile is along the hidden size. */
static inline double ffma_us(const mv_task *t) {
    return 20 + larger(static_cast<double>(t->hidden) * 0.23, tile_flops(t, 64) / 2.5e7);
}
static inline double norm_ffma_us(const mv_task *t) {
    const int64_t tiles = (t->tokens + 63) / 64 * ((t->linear.outputs + 63) / 64);
    const double turns = static_cast<double>((tiles + t->sm_count - 1) / t->sm_count);
    return 5 + static_cast<double>(t->hidden) * larger(0.056, turns * 64 * 64 * 2 / 2.9e5);
}

} // namespace h100
