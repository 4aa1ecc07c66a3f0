/* prices.cuh: host: what the products take on a GPU, in microseconds (SPEED.md): the figures that the choice among them
 * goes by. Each is launches, and the larger of the weights at the memory's speed, of which a kernel reaches some share,
 * and the products at its rate. They were measured on an H100 and, those of 16 bits, on an H200; other GPUs get the
 * speed of their memory and the rest of these. The tiles of a product have figures of their own, beside them. */
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

/* It takes 4 tokens at a time. */
static inline double decode_sm80_us(const mv_task *t) {
    return 1.5 * static_cast<double>(t->tokens) + static_cast<double>((t->tokens + 3) / 4) * (1.7 + 1.04 * read_us(t));
}

/* token_bytes: of the tokens of a block, which it reads, and normalises where there is a norm, before it multiplies. */
static inline double decode_sm90a_us(const mv_task *t, double token_bytes) {
    return (t->tokens > 8 ? 1.3 : 0.9) + read_us(t) + weight_bytes(t) / 100e6 +
           token_bytes / (t->linear.plain_x ? 60e3 : 25e3);
}

static inline double norm_mma_us(const mv_task *t) { return 6 + larger(1.3 * read_us(t), tile_flops(t, 32) / 4.3e8); }

/* Without a norm no launch in front hides the start of the product. */
static inline double norm_wgmma_us(const mv_task *t) {
    const double launches = t->linear.plain_x ? 4.2 : 2.2;
    return launches + larger(read_us(t) + weight_bytes(t) / 55e6, tile_flops(t, 128) / 6.2e8);
}

static inline double norm_3xtf32_us(const mv_task *t, double product_us) {
    const double norm_us = static_cast<double>(t->tokens * t->hidden) * 12 / 2.7e6; /* y is twice as large as x */
    return 3.2 + norm_us + product_us;
}

static inline double norm_few_us(const mv_task *t) {
    const double ends = 1 + 300 / static_cast<double>(t->hidden); /* of tiles: what short rows do not hide */
    const double weights = 1.06 * read_us(t), products = tile_flops(t, 8) / 3.6e7 * ends;
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

} // namespace prices
