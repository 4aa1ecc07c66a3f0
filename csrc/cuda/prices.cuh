/* prices.cuh: host: what the products take on a GPU, in microseconds (SPEED.md): the figures that the choice among them
 * goes by. Each is launches, and the larger of the weights at the memory's speed, of which a kernel reaches some share,
 * and the products at its rate. They were measured on an H100 and, those of 16 bits, on an H200; other GPUs get the
 * speed of their memory and the rest of these. The tiles of a product have figures of their own, beside them. */
#pragma once

#include "kernel.h"

namespace prices {

static inline double larger(double a, double b) { return a > b ? a : b; }

static inline double weight_bytes(const mv_task *t) {
    return static_cast<double>(t->linear.outputs) * static_cast<double>(t->hidden) *
           static_cast<double>(mv_dtype_bytes(t->linear.weight_dtype));
}

/* Bytes per microsecond that memory delivers: 93 % of what its clock and width say, as both GPUs reach. */
static inline double memory_rate(const mv_task *t) { return 0.93e3 * (t->memory_gbs > 0 ? t->memory_gbs : 3352); }

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

/* decode_attention with so many bytes of keys and values in full caches. The CUDA cores take longer the more query
 * heads share a key, and for each sequence; the tensor cores start sooner, soonest in clusters, and what the blocks of
 * one sequence and head of keys take together is limited. */
static inline double attention_us(const mv_task *t, double start, double rate, double rate_of_head, double bytes) {
    const mv_attention &a = t->attention;
    const double heads = static_cast<double>(t->tokens / a.heads * a.kv_heads), all = 0.95 * memory_rate(t);
    const double most = heads * rate_of_head < all ? heads * rate_of_head : all;
    return start + bytes / (rate < most ? rate : most);
}
static inline double attention_cores_us(const mv_task *t, double bytes) {
    const mv_attention &a = t->attention;
    const int64_t of_key = a.heads / a.kv_heads;
    const double rate = of_key <= 2 ? 4.2e6 : of_key <= 4 ? 2.8e6 : of_key <= 8 ? 1.5e6 : 0.8e6;
    return attention_us(t, 5.5 + 0.2 * static_cast<double>(t->tokens / a.heads), rate, rate, bytes);
}
static inline double attention_mma_us(const mv_task *t, double bytes) {
    return attention_us(t, 5.5, 4.2e6, 0.5e6, bytes);
}
static inline double attention_clusters_us(const mv_task *t, double bytes) {
    return attention_us(t, 4, 4.5e6, 0.5e6, bytes);
}

/* greedy_tokens, whose rows go to so many SMs each, of which one takes 0.1 MB in a microsecond. Not measured: the
 * figures order its rows. */
static inline double greedy_us(const mv_task *t, double sms_of_row) {
    const double bytes =
        static_cast<double>(t->tokens) * static_cast<double>(t->hidden) * static_cast<double>(mv_dtype_bytes(t->dtype));
    const double wanted = static_cast<double>(t->tokens) * sms_of_row, sms = static_cast<double>(t->sm_count);
    return 3 + larger(bytes / (1e5 * (wanted < sms ? wanted : sms)), bytes / memory_rate(t));
}

} // namespace prices
