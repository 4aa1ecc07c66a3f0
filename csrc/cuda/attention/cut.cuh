/* cut.cuh: how a call of the attention on tensor cores is cut into blocks, and which instance it takes: what
 * decode_attention_mma.cuh asks on the host. */
#pragma once

#include "cuda/attention/merge.cuh"
#include "cuda/prices/attention.cuh"

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
    return !a.block_table && !a.ring && a.soft_cap == 0 && is_usual(a.q_norm) && is_usual(a.k_norm) &&
           a.rotary.columns == dim && a.rotary.dtype == task->dtype && !a.rotary.interleaved &&
           in_parts(a.rotary.cos, a.rotary.cos_stride, 0) && in_parts(a.rotary.sin, a.rotary.sin_stride, 0) &&
           rows_in_parts(task->x) && rows_in_parts(a.k);
}

/* What the keys and values of one head of one sequence are, in bytes, where the cache is full. */
double bytes_of_head(const mv_task *task) {
    return 4.0 * static_cast<double>(most_keys(task)) * static_cast<double>(task->hidden);
}

/* Chooses the pieces of a sequence, and who merges them: a cluster, or a second launch. How full the caches are is not
 * known here, so they count twice, full and an eighth of it. Returns what full ones take, in microseconds. */
double choose_cut(const mv_task *task, bool hopper, int blocks_of_sm, double ring_bytes, Cut &cut) {
    const double heads = static_cast<double>(priced_sequences(task) * task->attention.kv_heads * cut.passes);
    const prices::AttentionRoom room = {static_cast<double>(blocks_of_sm) * task->sm_count, ring_bytes};
    const int64_t most = parts(most_keys(task), kLeastOfPiece);
    /* Part of a GPU, or blocks that have an SM each, may not have room for more than the 8 that any GPU promises. */
    const int64_t most_of_cluster = blocks_of_sm > 1 && task->sm_count >= 100 ? kMostCluster : kMostCluster / 2;
    double best = INFINITY, lowest = INFINITY;
    const auto consider = [&](int64_t pieces, bool in_cluster) {
        const auto filled = [&](double bytes) {
            return prices::attention_cut_us(task, heads, bytes, room, pieces, in_cluster, kMergePieces);
        };
        const double us = filled(bytes_of_head(task)), both = us * filled(bytes_of_head(task) / 8);
        if (both >= lowest) return;
        lowest = both;
        best = us;
        cut.pieces = static_cast<int32_t>(pieces);
        cut.cluster = in_cluster ? cut.pieces : 0;
    };
    consider(1, false);
    for (int64_t pieces = 2; pieces <= kMostCluster && pieces < 2 * most; pieces *= 2) {
        /* Clusters of four blocks and more are slow unless there is an SM for each of their blocks. */
        const bool fits = pieces == 2 || heads * static_cast<double>(pieces) <= task->sm_count;
        if (hopper && pieces <= most_of_cluster && fits) consider(pieces, true);
        consider(least(pieces, most), false);
    }
    for (int turn = 1; turn <= 4; turn++) /* as many pieces as there is room for */
        if (const int64_t pieces = least(static_cast<int64_t>(turn * room.blocks / heads), most); pieces > kMostCluster)
            consider(pieces, false);
    return best + prices::attention_queries_us(cut.group) + (is_merged_later(cut) ? prices::kAttentionLaunch : 0);
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
