/* attention_cut.cuh: how a call of the attention on tensor cores is cut into blocks, and which instance it takes: what
 * attention_mma.cuh asks on the host. */
#pragma once

#include "attention_merge.cuh"

namespace {

constexpr int kLeastOfPiece = 32; /* keys */
constexpr int kMostHeadsOfBlock = 16, kMostCluster = 16;
constexpr uint32_t kNoRow = 0xffffffffu; /* of a cache, in packets of 16 bytes: there is no such row */

/* Keys of a sequence at most, and of a piece. */
int64_t most_keys(const mv_task *task) { return least(task->attention.rows, task->attention.window); }
int64_t most_of_piece(const mv_task *task, const Cut &cut) {
    const int64_t even = parts(most_keys(task), cut.pieces);
    return even > kLeastOfPiece ? even : kLeastOfPiece;
}

/* Can a lane load its part of each row of heads at once, and is all else as the instances for common calls have it? */
bool is_common(const mv_task *task) {
    const mv_attention &a = task->attention;
    const int64_t dim = task->hidden, of_lane = dim / 64;
    if (dim != 64 && dim != 128 && dim != 256) return false;
    const auto is_aligned = [](const void *data, int64_t to) {
        return reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(to) == 0;
    };
    const auto is_usual = [&](const mv_head_norm &norm) {
        return !norm.weight || (norm.weight_dtype == task->dtype && is_aligned(norm.weight, 2 * of_lane));
    };
    const bool is_alone = task->tokens == a.heads; /* the distance to a next sequence does not matter */
    const auto in_parts = [&](const void *data, int64_t outer, int64_t inner) {
        return is_aligned(data, 2 * of_lane) && (is_alone || outer % of_lane == 0) && inner % of_lane == 0;
    };
    const auto rows_in_parts = [&](const mv_rows &rows) {
        return in_parts(rows.data, rows.outer_stride, rows.inner_stride);
    };
    return !a.block_table && !a.ring && a.soft_cap == 0 && task->rounding != MV_ROUNDING_FP32 && is_usual(a.q_norm) &&
           is_usual(a.k_norm) && a.rotary.columns == dim && a.rotary.dtype == task->dtype && !a.rotary.interleaved &&
           in_parts(a.rotary.cos, a.rotary.cos_stride, 0) && in_parts(a.rotary.sin, a.rotary.sin_stride, 0) &&
           rows_in_parts(task->x) && rows_in_parts(a.k);
}

/* What the keys and values of one head of one sequence are, in bytes, where the cache is full. */
double bytes_of_head(const mv_task *task) {
    return 4.0 * static_cast<double>(most_keys(task)) * static_cast<double>(task->hidden);
}

/* What `blocks` blocks of so many bytes take, in microseconds, if `room` of them run at a time. An SM gets its share of
 * what memory delivers, a block alone not more than its ring has room for in a latency; a block in a later turn begins
 * while others still run. The figures are an H200's. */
double blocks_us(const mv_task *task, double blocks, double room, double bytes) {
    constexpr double sm_bytes_per_us = 34.6e3, most_of_block = 30e3, begin_us = 2, turn_us = 0.5;
    const double all = sm_bytes_per_us * task->sm_count, turns = floor(blocks / room), rest = blocks - turns * room;
    const double rest_us = rest > 0 ? turn_us + bytes / fmin(most_of_block, all / rest) : 0;
    return begin_us + turns * (turn_us + bytes / fmin(most_of_block, all / room)) + rest_us;
}

/* Chooses the pieces of a sequence, and who merges them. */
void choose_cut(const mv_task *task, bool hopper, int blocks_of_sm, Cut &cut) {
    constexpr double of_cluster_us = 0.35, of_each_us = 0.15, launch_us = 2; /* clusters wait for all their blocks */
    /* How a sequence is cut may depend on how many others there are only where its bits may. */
    const int64_t sequences = task->batch_invariant ? 1 : task->tokens / task->attention.heads;
    const double heads = static_cast<double>(sequences * task->attention.kv_heads * cut.passes);
    const double room = static_cast<double>(blocks_of_sm) * task->sm_count, bytes = bytes_of_head(task);
    const int64_t most = parts(most_keys(task), kLeastOfPiece);
    /* Part of a GPU, or blocks that have an SM each, may not have room for more than the 8 that any GPU promises. */
    const int64_t most_of_cluster = blocks_of_sm > 1 && task->sm_count >= 100 ? kMostCluster : kMostCluster / 2;
    double best = INFINITY;
    const auto consider = [&](int64_t pieces, bool in_cluster) {
        const double count = static_cast<double>(pieces);
        const double merge_us = pieces == 1 ? 0 : in_cluster ? of_cluster_us + of_each_us * count : launch_us;
        const double us = blocks_us(task, heads * count, room, bytes / count) + merge_us;
        if (us >= best) return;
        best = us;
        cut.pieces = static_cast<int32_t>(pieces);
        cut.cluster = in_cluster && pieces > 1 ? cut.pieces : 0;
    };
    consider(1, false);
    for (int64_t pieces = 2; hopper && pieces <= most_of_cluster && pieces < 2 * most; pieces *= 2)
        consider(pieces, true);
    for (int turn = 1; turn <= 4; turn++) /* as many pieces as there is room for */
        if (const int64_t pieces = least(static_cast<int64_t>(turn * room / heads), most); pieces > 1)
            consider(pieces, false);
}

/* Are all rows within 2^32 packets of 16 bytes? */
bool is_near(const mv_task *task, const mv_cache &cache) {
    const mv_attention &a = task->attention;
    if (cache.block_stride < 0 || cache.row_stride < 0 || cache.head_stride < 0) return false;
    const double last = static_cast<double>(cache.block_stride) * static_cast<double>(a.blocks) +
                        static_cast<double>(cache.row_stride) * static_cast<double>(a.block_rows) +
                        static_cast<double>(cache.head_stride) * static_cast<double>(a.kv_heads);
    return last / 8 < kNoRow;
}

} // namespace
