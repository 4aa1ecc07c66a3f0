/* cut.cuh: how a call of the attention on tensor cores is cut into blocks, and which instance it takes: what
 * decode_attention_mma.cuh asks on the host. */
#pragma once

#include "cuda/attention/merge.cuh"
#include "cuda/prices.cuh"

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

/* What `blocks` blocks of so many bytes take, in microseconds, if `room` of them run at a time. A block alone reads
 * what its ring has room for in a latency of memory, as an H200 showed it; all together read what memory delivers; and
 * where the two are near each other, less than either. */
double blocks_us(const mv_task *task, double blocks, double room, double bytes) {
    constexpr double rate_of_block = 47e3, turn_us = 0.5;
    const auto turn = [&](double running) {
        const double alone = bytes / rate_of_block, shared = bytes * running / prices::memory_rate(task);
        return running > 0 ? turn_us + sqrt(sqrt(alone * alone * alone * alone + shared * shared * shared * shared))
                           : 0;
    };
    const double turns = floor(blocks / room);
    return turns * turn(room) + turn(blocks - turns * room);
}

/* Chooses the pieces of a sequence, and who merges them: a cluster, whose blocks wait for each other and are not spread
 * evenly over the SMs, or a second launch, which loads kMergePieces pieces at a time. All figures are fitted to the
 * times of forced cuts on an H200, 1 to 32 sequences of 512 to 32,768 keys. */
void choose_cut(const mv_task *task, bool hopper, int blocks_of_sm, Cut &cut) {
    constexpr double of_cluster_us = 0.2, of_each_us = 0.25, evenness = 0.96, launch_us = 4.5, of_more_us = 1.5;
    /* How a sequence is cut may depend on how many others there are only where its bits may. */
    const int64_t sequences = task->batch_invariant ? 1 : task->tokens / task->attention.heads;
    const double heads = static_cast<double>(sequences * task->attention.kv_heads * cut.passes);
    const double room = static_cast<double>(blocks_of_sm) * task->sm_count, bytes = bytes_of_head(task);
    const int64_t most = parts(most_keys(task), kLeastOfPiece);
    /* Part of a GPU, or blocks that have an SM each, may not have room for more than the 8 that any GPU promises. */
    const int64_t most_of_cluster = blocks_of_sm > 1 && task->sm_count >= 100 ? kMostCluster : kMostCluster / 2;
    double best = INFINITY;
    const auto consider = [&](int64_t pieces, bool in_cluster) {
        const double count = static_cast<double>(pieces), blocks = heads * count;
        double us = blocks_us(task, blocks, room, bytes / count);
        if (in_cluster)
            us = us / (pieces > 2 ? evenness : 1) + of_cluster_us + of_each_us * count;
        else if (pieces > 1)
            us += launch_us + of_more_us * static_cast<double>((pieces - 1) / kMergePieces);
        if (us >= best) return;
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
        if (const int64_t pieces = least(static_cast<int64_t>(turn * room / heads), most); pieces > kMostCluster)
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
