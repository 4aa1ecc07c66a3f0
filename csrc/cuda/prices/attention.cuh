/* attention.cuh: host: what the rows of decode_attention take on a GPU, in microseconds. Those on the tensor cores are
 * fitted to the times of forced cuts on an H200, of 1 to 32 sequences of 512 to 32,768 keys, and to those of the chosen
 * cuts on an H100; that on the CUDA cores to the chosen cuts on both. */
#pragma once

#include "cuda/prices/memory.cuh"

namespace prices {

/* How the blocks of a cut run: so many at a time, each with rings of so many bytes. */
struct AttentionRoom {
    double blocks, ring_bytes;
};

/* Blocks on the tensor cores, of which each reads so many bytes. One alone reads what its rings hold in each latency of
 * memory; all that run share what memory delivers. Each turn begins with what no copies hide. */
static inline double attention_blocks_us(const mv_task *t, double blocks, double bytes, const AttentionRoom &room) {
    constexpr double kLatency = 2.03, kTurn = 2;
    const double alone = bytes * kLatency / room.ring_bytes, turns = floor(blocks / room.blocks);
    const auto turn = [&](double running) {
        return running > 0 ? kTurn + together(alone, bytes * running / memory_rate(t)) : 0;
    };
    return turns * turn(room.blocks) + turn(blocks - turns * room.blocks);
}

/* The same where a sequence and a head of keys have several blocks. A cluster merges what they find. Its blocks wait
 * for each other; while there is an SM for each block, those of larger clusters lie less evenly on the SMs, and more
 * than two leave the fewer SMs that they fit on, the fuller the GPU is. Else a second launch merges, which loads
 * `at_once` pieces at a time. */
static inline double attention_cut_us(const mv_task *t, double heads, double bytes_of_head, const AttentionRoom &room,
                                      int64_t pieces, bool in_cluster, int64_t at_once) {
    constexpr double kCluster = 0.1, kClusterBlock = 0.1, kUneven = 0.01, kCrowded = 0.1, kLaunch = 2.15, kMore = 1.5;
    const double count = static_cast<double>(pieces), full = heads * count / t->sm_count;
    const double uneven = kUneven * count + (pieces > 2 ? kCrowded * full * full : 0);
    const double slower = in_cluster && full <= 1 ? 1 / (1 - uneven) : 1;
    const double us = attention_blocks_us(t, heads * count, slower * bytes_of_head / count, room);
    if (in_cluster) return us + kCluster + kClusterBlock * count;
    return pieces > 1 ? us + kLaunch + kMore * static_cast<double>((pieces - 1) / at_once) : us;
}

/* So much more than in full caches is a second launch priced among the rows, since in others it is the larger part. */
constexpr double kAttentionLaunch = 1;

/* What each query head of a block takes of the tensor cores' rows, beside its keys. */
static inline double attention_queries_us(int queries) { return 0.33 * queries; }

/* How a turn of blocks on the CUDA cores begins, and what all of them read in a microsecond: how to cut for them. */
constexpr double kAttentionCoresTurn = 2, kAttentionCoresRate = 4e6;

/* The CUDA cores, of so many bytes of keys and values. They multiply a key once for each query head that shares it, so
 * both a turn of blocks and the rate depend on how many do. */
static inline double attention_cores_us(const mv_task *t, double bytes, double turns) {
    const int64_t of_key = t->attention.heads / t->attention.kv_heads;
    const double columns = static_cast<double>(of_key * t->hidden) / 128;
    const double rate = of_key <= 2 ? 4.2e6 : of_key <= 4 ? 2.7e6 : of_key <= 8 ? 1.45e6 : 0.8e6;
    return 5 + turns * (2 + 0.6 * columns) + larger(bytes / rate, bytes / (0.95 * memory_rate(t)));
}

} // namespace prices
