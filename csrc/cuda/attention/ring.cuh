/* ring.cuh: the instances of the attention on tensor cores, their shared memory, and the rings through which
 * the keys and values of a warp come. */
#pragma once

#include "cuda/arch/mma.cuh"
#include "cuda/attention/cut.cuh"
#include "cuda/attention/head.cuh"

namespace {

constexpr int kTileKeys = 16, kTileHeads = 8; /* of one product */
constexpr float kLog2OfE = 1.44269504088896341f;

/* An instance: heads of up to kColumns columns, kTiles times 8 query heads of a block. kHopper: blocks may be a
 * cluster, and an SM has room for longer rings. kCommon: a call as most models make it (is_common), which takes
 * fewer instructions. */
template <typename T_, int kColumns_, int kTiles_, bool kHopper_, bool kCommon_> struct MmaInstance {
    using T = T_;
    static constexpr bool kCommon = kCommon_;
    using OwnHead = typename HeadOf<T, kColumns_ / 32, kCommon>::Type;
    static constexpr int kColumns = kColumns_, kTiles = kTiles_, kHeads = kTiles * kTileHeads;
    static constexpr bool kHopper = kHopper_;
    static constexpr int kWarps = 4, kThreads = kWarps * 32;
    static constexpr int kSteps = kColumns / 16, kChunks = kColumns / 8;          /* a chunk: 16 bytes of a row */
    static constexpr int kLanes = kColumns <= 64 ? 8 : kColumns <= 128 ? 16 : 32; /* that copy a row */
    static constexpr int kRowBytes = kLanes * 16, kUnitBytes = kTileKeys * kRowBytes;
    /* Tiles of keys, and as many of values, of a warp's ring. */
    static constexpr int kAhead = (kHopper && kTiles == 1 ? 3 : 2) * (kColumns <= 64 ? 2 : 1);
    static constexpr int kSlots = 2 * kAhead;
    static constexpr int kBlocks = kColumns <= 128 ? 2 : 1; /* of an SM */
    static constexpr int kQueryStride = kColumns + 8;       /* values: rows begin in different banks */
    static constexpr int kOutStride = kColumns + 4;
    static constexpr bool kKeepsQueries = kTiles * kSteps <= 16; /* in registers: there are enough for that */
    static constexpr int kSumBytes = kHeads * kOutStride * static_cast<int>(sizeof(float)); /* in place of the ring */
    static_assert(kSumBytes <= kSlots * kUnitBytes, "the longest ring has room for them");
};

/* A block's shared memory behind the rings. */
template <typename S> struct Memory {
    using T = typename S::T;
    T query[2][S::kHeads][S::kQueryStride]; /* the rounded values, and what that leaves of them */
    alignas(16) T new_key[S::kColumns];
    alignas(16) T new_value[S::kColumns];
    float head[S::kWarps][S::kColumns];         /* that goes through norm and rotary embedding */
    float2 found[S::kWarps][S::kHeads];         /* by the warps: m and sum p_j */
    float2 sent_found[kMostCluster][S::kHeads]; /* by the blocks of the cluster */
    float4 sent_out[S::kHopper ? S::kHeads * S::kColumns / 4 + kMostCluster : 1]; /* [block][share]: sum p_j v_j */
    alignas(8) uint64_t all_sent;                                                 /* counts the bytes */
};
template <typename S> constexpr size_t attention_shared_bytes(int ring) {
    return static_cast<size_t>(S::kWarps * ring) + sizeof(Memory<S>);
}

/* ---- keys and values --------------------------------------------------------------------------------------------- */

/* Where chunk `chunk` of row `row` of a tile is: no two of 8 rows have it in the same banks. */
template <typename S> __device__ __forceinline__ uint32_t chunk_at(int row, int chunk) {
    return static_cast<uint32_t>(row * S::kRowBytes + (chunk ^ (row & 7)) * 16);
}

/* Brings tiles of a warp to its ring. Lanes 0 to 15 know where the keys of a tile are, the others where its values. */
template <typename S> struct KeyRing {
    const mv_task &task;
    const Cut &cut;
    const int sequence, kv_head, lane;
    Keys keys;
    int end;                                    /* of the keys that are in the cache */
    const char *base[2];                        /* of keys and values, at the lane's chunk */
    uint32_t block_stride, row_stride, head_at; /* of keys or values, in chunks */
    float missing = 0;                          /* NaN once there was no page for a key */

    __device__ __forceinline__ KeyRing(const mv_task &task, const Cut &cut, int sequence, int kv_head)
        : task(task), cut(cut), sequence(sequence), kv_head(kv_head), lane(threadIdx.x % 32), end(0) {
        const mv_attention &a = task.attention;
        const mv_cache &own = lane < 16 ? a.keys : a.values;
        block_stride = static_cast<uint32_t>(own.block_stride / 8);
        row_stride = static_cast<uint32_t>(own.row_stride / 8);
        head_at = static_cast<uint32_t>(kv_head) * static_cast<uint32_t>(own.head_stride / 8);
        base[0] = static_cast<const char *>(a.keys.data) + lane % S::kLanes * 16;
        base[1] = static_cast<const char *>(a.values.data) + lane % S::kLanes * 16;
    }

    /* Fills the ring with the warp's tiles of keys [key, until), and leaves in `rows` where the tile behind them is. */
    __device__ __forceinline__ void fill(const Keys &of, int key, int until, uint32_t slots, uint32_t &rows) {
        constexpr int kApart = S::kWarps * kTileKeys;
        keys = of, end = min(until, keys.count - 1);
        rows = row_of(key);
#pragma unroll 1
        for (int i = 0; i < S::kAhead; i++) {
            const uint32_t coming = rows;
            rows = row_of(key + (i + 1) * kApart);
            bring(key + i * kApart, until, coming, slots + i * 2 * S::kUnitBytes);
        }
    }

    /* Where the lane's row of the tile that begins with `key` is, in chunks. */
    __device__ __forceinline__ uint32_t row_of(int key) {
        if constexpr (S::kCommon) return kNoRow; /* nobody asks */
        key += lane % kTileKeys;
        if (key >= end) return kNoRow;
        const CacheRow row(task, cut, keys, sequence, key);
        if (row.block < 0) {
            missing = NAN;
            return kNoRow;
        }
        return static_cast<uint32_t>(row.block) * block_stride + static_cast<uint32_t>(row.row) * row_stride + head_at;
    }

    /* Brings a tile of keys, then one of values, those from `key` on: two groups of copies, which are empty where there
     * is no such tile. What there is no row for becomes zeros. */
    __device__ __forceinline__ void bring(int key, int until, uint32_t rows, uint32_t slot) const {
        constexpr int kRows = 32 / S::kLanes; /* at a time */
        const int chunk = lane % S::kLanes, first = lane / S::kLanes;
        const bool is_one = key < until;
        if constexpr (S::kCommon) { /* one row after the other */
            static_assert(S::kChunks == S::kLanes, "whole rows");
            const int row = key + first;
#pragma unroll 1
            for (int which = 0; which < 2; which++) {
                const mv_cache &cache = which ? task.attention.values : task.attention.keys;
                const char *from =
                    (which ? base[1] : base[0]) + 2 * (sequence * cache.block_stride + kv_head * cache.head_stride +
                                                       (keys.first + row) * cache.row_stride);
                const int64_t apart = 2 * kRows * cache.row_stride;
                if (is_one)
#pragma unroll
                    for (int i = 0; i < kTileKeys; i += kRows, from += apart)
                        cp_async16(slot + chunk_at<S>(i + first, chunk), from, row + i < end);
                cp_async_commit();
                slot += S::kUnitBytes;
            }
            return;
        }
        const bool wanted = chunk < static_cast<int>(task.hidden) / 8;
        const uint32_t first_row = __shfl_sync(0xffffffffu, rows, lane & 16);
        /* All there, and equally far apart: then an address is a sum. */
        const bool even = __all_sync(0xffffffffu, rows != kNoRow && rows - first_row == lane % 16 * row_stride);
#pragma unroll 1
        for (int which = 0; which < 2; which++) {
            const char *from = which ? base[1] : base[0];
            if (is_one && even) {
                const int64_t apart = int64_t{__shfl_sync(0xffffffffu, row_stride, which * 16)} * 16;
                from += int64_t{__shfl_sync(0xffffffffu, rows, which * 16)} * 16 + apart * first;
#pragma unroll
                for (int i = 0; i < kTileKeys; i += kRows, from += apart * kRows)
                    if (chunk < S::kChunks) cp_async16(slot + chunk_at<S>(i + first, chunk), from, wanted);
            } else if (is_one) {
#pragma unroll
                for (int i = 0; i < kTileKeys; i += kRows) {
                    const uint32_t at = __shfl_sync(0xffffffffu, rows, which * 16 + i + first);
                    const bool there = at != kNoRow && wanted;
                    if (chunk < S::kChunks)
                        cp_async16(slot + chunk_at<S>(i + first, chunk), from + (there ? int64_t{at} * 16 : 0), there);
                }
            }
            cp_async_commit();
            slot += S::kUnitBytes;
        }
    }
};

/* The new token's key or value takes its row of a tile. */
template <typename S>
__device__ __forceinline__ void place_new(char *slot, int row, const typename S::T (&from)[S::kColumns]) {
    const int lane = threadIdx.x % 32;
    if (lane < S::kChunks)
        *reinterpret_cast<uint4 *>(slot + chunk_at<S>(row, lane)) = reinterpret_cast<const uint4 *>(from)[lane];
    __syncwarp();
}

/* Before the wait: asks L2 for the keys and values that fill the ring, lanes 0 to 15 for keys, the others for values.
 * What the position says may be old: then the wrong rows of the cache are asked for. */
template <typename S> __device__ __forceinline__ void prefetch_tiles(const mv_task &task, const Cut &cut, int sequence,
                                                                     int kv_head, int piece) {
    const int warp = static_cast<int>(threadIdx.x / 32), lane = threadIdx.x % 32;
    const Keys keys(task, load_place<When::kToAim>(task, sequence), cut.pieces, kLeastOfPiece);
    const int first = piece * keys.piece, end = min(first + keys.piece, keys.count - 1);
    int key = first + warp * kTileKeys + lane % kTileKeys;
#pragma unroll 1
    for (int i = 0; i < S::kAhead && key < end; i++, key += S::kWarps * kTileKeys) {
        const CacheRowAt<When::kToAim> row(task, cut, keys, sequence, key);
        if (row.block >= 0)
            prefetch_l2(
                row.template of<const typename S::T>(lane < 16 ? task.attention.keys : task.attention.values, kv_head),
                2 * task.hidden);
    }
}

} // namespace
