/* attention_mma.cuh: one new token per sequence against its cache, on tensor cores: the kernel of the files
 * decode_attention_mma_*.cu, and how it cuts a call.
 *
 * A block has a sequence, a key-value head, up to 16 query heads that share it, and a piece of the keys. Each of its
 * four warps has every fourth tile of 16 keys, a ring of its own in shared memory, to which asynchronous copies bring
 * tiles of keys and of values, and a softmax of its own. No warp waits for another before the end.
 *
 * The keys are the wide operand: S^T = K Q^T has 16 keys and 8 query heads in a product, so up to 8 query heads cost
 * one. A lane then has two heads of two keys. O^T = V^T P^T, 16 columns at a time, takes P^T with its 8 x 8 values
 * transposed between the lanes, and gives the lane sums of the same two heads: what shrinks them is at hand. P is not
 * rounded to 16 bits but taken apart into two such parts, which are multiplied one after the other; where "fp32" leaves
 * q unrounded, so is q. Scores, softmax and sums are float32.
 *
 * What a short call takes is a chain: the launch; the wait for the kernel in front; the load of the position; that of
 * the block table, where there are pages; the first keys; two products and a softmax; the merge of the warps, that of
 * the blocks; the store. Blocks that begin before the kernel in front is done read the position then, too, which may
 * not be the one that counts. Where the caller promises that older rows are static, they copy the first keys and values
 * that it points to, and look after the wait whether those were the right ones; else they have L2 ask memory for them.
 * All else happens meanwhile: the heads and the new value are asked for right behind the position, and norm and rotary
 * embedding run while the first tiles are on their way.
 *
 * The new token is a row of the last tile: its key and value are copied there from shared memory, where the block that
 * has the last piece made them. It alone writes them to the cache.
 *
 * Merging: on Hopper the blocks of a sequence and a head are a cluster of up to 16. Each sends what it has found to the
 * shared memory of the others, each of which gets a share of the columns, waits at a barrier of its own that counts the
 * bytes, and merges. They must all have begun before anyone sends: the cluster's barrier is arrived at with the first
 * instructions and waited for after the last key. Where so many blocks are too few for the GPU, and on other GPUs, a
 * second launch merges. In either case the order is fixed: the bits are the same every time.
 *
 * What counts for few keys is instructions: each warp runs some two thousand of them one after the other, and in a
 * model a call finds none of them in the caches of the SM. So a call as most models make it has instances of its own,
 * and what is long is there once or twice, and not unrolled. */
#pragma once

#include "attention_merge.cuh"
#include "head.cuh"
#include "mma.cuh"
#include "prices.cuh"
#include "tma.cuh"

namespace {

constexpr int kTileKeys = 16, kTileHeads = 8; /* of one product */
constexpr int kLeastOfPiece = 32;             /* keys */
constexpr int kMostHeadsOfBlock = 16, kMostCluster = 16;
constexpr float kLog2OfE = 1.44269504088896341f;
constexpr uint32_t kNoRow = 0xffffffffu;

/* An instance: heads of up to kColumns columns, kTiles times 8 query heads of a block. kHopper: blocks may be a
 * cluster, and an SM has room for longer rings. kCommon: a call as most models make it (is_common), which takes half
 * of the instructions. */
template <typename T_, int kColumns_, int kTiles_, bool kHopper_, bool kCommon_> struct Instance {
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
template <typename S> constexpr size_t shared_bytes(int ring) {
    return static_cast<size_t>(S::kWarps * ring) + sizeof(Memory<S>);
}

/* ---- keys and values --------------------------------------------------------------------------------------------- */

/* Where chunk `chunk` of row `row` of a tile is: no two of 8 rows have it in the same banks. */
template <typename S> __device__ __forceinline__ uint32_t chunk_at(int row, int chunk) {
    return static_cast<uint32_t>(row * S::kRowBytes + (chunk ^ (row & 7)) * 16);
}

/* Brings tiles of a warp to its ring. Lanes 0 to 15 know where the keys of a tile are, the others where its values. */
template <typename S> struct Ring {
    const mv_task &task;
    const Cut &cut;
    const int sequence, kv_head, lane;
    Keys keys;
    int end;                                    /* of the keys that are in the cache */
    const char *base[2];                        /* of keys and values, at the lane's chunk */
    uint32_t block_stride, row_stride, head_at; /* of keys or values, in chunks */
    float missing = 0;                          /* NaN once there was no page for a key */

    __device__ __forceinline__ Ring(const mv_task &task, const Cut &cut, int sequence, int kv_head)
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

/* ---- heads ------------------------------------------------------------------------------------------------------- */

/* The heads that go through norm and rotary embedding in a block: its queries, then the new key. A warp has every
 * fourth of them, asks for its first before the position is known, and for each other one before it is done with the
 * one in front. */
template <typename S> struct HeadQueue {
    using T = typename S::T;
    const mv_task &task;
    const int sequence, kv_head, first_head, group, warp;
    typename S::OwnHead now;

    __device__ __forceinline__ HeadQueue(const mv_task &task, int sequence, int kv_head, int first_head, int group)
        : task(task), sequence(sequence), kv_head(kv_head), first_head(first_head), group(group),
          warp(static_cast<int>(threadIdx.x / 32)) {}
    __device__ __forceinline__ void load_first() { load(now, warp); }
    /* Before the wait: L2 has what is asked for behind it, and the SM knows its pages. A lane asks for a row. */
    __device__ __forceinline__ void prefetch_first() const {
        const mv_attention &a = task.attention;
        const int lane = static_cast<int>(threadIdx.x % 32), bytes = 2 * static_cast<int>(task.hidden);
        const auto of_rotary = [&](const void *rows, int64_t stride) {
            const int size = a.rotary.dtype == MV_F32 ? 4 : 2;
            prefetch_l2(static_cast<const char *>(rows) + sequence * stride * size,
                        size * static_cast<int>(a.rotary.columns));
        };
        if (warp > group) return;
        const void *const weight = norm_of(warp).weight;
        if (lane == 0) prefetch_l2(row_of(warp), bytes);
        if (lane == 1 && weight) prefetch_l2(weight, norm_of(warp).weight_dtype == MV_F32 ? 2 * bytes : bytes);
        if (lane == 2 && a.rotary.columns) of_rotary(a.rotary.cos, a.rotary.cos_stride);
        if (lane == 3 && a.rotary.columns) of_rotary(a.rotary.sin, a.rotary.sin_stride);
        if (lane == 4) prefetch_l2(kv_row(a.v), bytes);
    }
    __device__ __forceinline__ const T *row_of(int h) const {
        return h < group ? head_address<const T>(task, task.x, sequence, first_head + h) : kv_row(task.attention.k);
    }
    __device__ __forceinline__ const T *kv_row(const mv_rows &rows) const {
        return static_cast<const T *>(rows.data) + sequence * rows.outer_stride + kv_head * rows.inner_stride;
    }
    __device__ __forceinline__ const mv_head_norm &norm_of(int h) const {
        return h < group ? task.attention.q_norm : task.attention.k_norm;
    }
    __device__ __forceinline__ void load(typename S::OwnHead &head, int h) const {
        if (h > group) return;
        head.load(row_of(h), static_cast<int>(task.hidden), norm_of(h), task.attention.rotary, sequence);
    }

    /* Leaves the queries in shared memory, and for the piece that has the new token also its key. */
    __device__ __forceinline__ void finish(Memory<S> &memory, bool has_new) {
#pragma unroll 1
        for (int h = warp; h <= group; h += S::kWarps) {
            if (h == group && !has_new) return;
            typename S::OwnHead next;
            load(next, h + S::kWarps);
            now.finish(static_cast<int>(task.hidden), norm_of(h), task.attention.rotary, task.rounding,
                       memory.head[warp], S::kColumns);
#pragma unroll
            for (int i = 0; i < S::kColumns / 32; i++) {
                const int column = now.column(i);
                const T rounded = from_float<T>(now.value[i]);
                if (h == group) {
                    memory.new_key[column] = rounded;
                    continue;
                }
                memory.query[0][h][column] = rounded;
                if (!S::kCommon)
                    memory.query[1][h][column] =
                        from_float<T>(isinf(to_float(rounded)) ? 0 : now.value[i] - to_float(rounded));
            }
            now = next;
        }
    }
};

/* ---- products ---------------------------------------------------------------------------------------------------- */

/* The product's other operand of 8 x 8 probabilities: what the lanes have of it, rounded, transposed. */
template <typename T> __device__ __forceinline__ uint32_t transposed_pair(float a, float b) {
    const float pair[2] = {a, b};
    return transpose_matrix(pack_word<T>(pair));
}

/* A warp's softmax: a lane has heads 2 (lane % 4) and the next, of each 8. */
template <typename S> struct WarpSoftmax {
    using T = typename S::T;
    uint32_t q[S::kTiles][S::kKeepsQueries ? S::kSteps : 2][2]; /* the operand Q^T, or what is needed next of it */
    float most[S::kTiles][2], sum[S::kTiles][2], out[S::kTiles][S::kSteps][4];
    float p[S::kTiles][4];
    uint32_t query_at[S::kTiles]; /* where the lane's part of q is; what its rounding leaves is so far behind it: */
    static constexpr uint32_t kLowBehind = S::kHeads * S::kQueryStride * sizeof(T);
    const int lane;
    const bool has_low;

    __device__ __forceinline__ WarpSoftmax(const Memory<S> &memory, int group, bool has_low)
        : lane(threadIdx.x % 32), has_low(has_low) {
#pragma unroll
        for (int t = 0; t < S::kTiles; t++) {
            const int head = min(t * kTileHeads + lane % 8, group - 1);
            query_at[t] = shared_address(&memory.query[0][head][lane / 8 * 8]);
            if constexpr (S::kKeepsQueries)
#pragma unroll
                for (int step = 0; step < S::kSteps; step += 2) load_query(t, step, step);
            most[t][0] = most[t][1] = -INFINITY;
            sum[t][0] = sum[t][1] = 0;
#pragma unroll
            for (int step = 0; step < S::kSteps; step++)
#pragma unroll
                for (int i = 0; i < 4; i++) out[t][step][i] = 0;
        }
    }

    /* Of steps `step` and the next, as the `to`-th and the next. */
    __device__ __forceinline__ void load_query(int t, int step, int to) {
        uint32_t both[4];
        ldmatrix_x4(both, query_at[t] + step * 32);
        q[t][to][0] = both[0], q[t][to][1] = both[1];
        q[t][to + 1][0] = both[2], q[t][to + 1][1] = both[3];
    }

    /* Leaves q . k of the tile's keys lane / 4 and lane / 4 + 8 in p: the first two, the second two. */
    __device__ __forceinline__ void multiply_keys(uint32_t slot) {
        float dot[2][S::kTiles][4] = {}; /* two sums: each waits for what the one before adds */
#pragma unroll
        for (int step = 0; step < S::kSteps; step += 2) {
            uint32_t k[2][4], low[4];
#pragma unroll
            for (int odd = 0; odd < 2; odd++)
                ldmatrix_x4(k[odd], slot + chunk_at<S>(lane % 16, (step + odd) * 2 + lane / 16));
#pragma unroll
            for (int t = 0; t < S::kTiles; t++) {
                if constexpr (!S::kKeepsQueries) load_query(t, step, 0);
                const int at = S::kKeepsQueries ? step : 0;
#pragma unroll
                for (int odd = 0; odd < 2; odd++)
                    mma_m16n8k16<T>(dot[odd][t], k[odd], q[t][at + odd][0], q[t][at + odd][1]);
                if (S::kCommon || !has_low) continue;
                ldmatrix_x4(low, query_at[t] + kLowBehind + step * 32);
#pragma unroll
                for (int odd = 0; odd < 2; odd++) mma_m16n8k16<T>(dot[odd][t], k[odd], low[2 * odd], low[2 * odd + 1]);
            }
        }
#pragma unroll
        for (int t = 0; t < S::kTiles; t++)
#pragma unroll
            for (int i = 0; i < 4; i++) p[t][i] = dot[0][t][i] + dot[1][t][i];
    }

    __device__ __forceinline__ void cap_scores(int count, float soft_cap) {
#pragma unroll
        for (int t = 0; t < S::kTiles; t++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (lane / 4 + i / 2 * 8 < count) p[t][i] = soft_cap * tanhf(p[t][i] / soft_cap);
    }

    /* Scores become probabilities. count: keys of the tile. scale and soft_cap are of base-2 logarithms. */
    __device__ __forceinline__ void add_scores(int count, float scale, float soft_cap) {
#pragma unroll
        for (int t = 0; t < S::kTiles; t++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                p[t][i] *= scale;
                if (lane / 4 + i / 2 * 8 >= count) p[t][i] = -INFINITY;
            }
        if (!S::kCommon && soft_cap != 0) cap_scores(count, soft_cap);
#pragma unroll
        for (int t = 0; t < S::kTiles; t++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float both = fmaxf(p[t][h], p[t][2 + h]);
#pragma unroll
                for (int lanes = 4; lanes < 32; lanes *= 2)
                    both = fmaxf(both, __shfl_xor_sync(0xffffffffu, both, lanes));
                both = fmaxf(both, most[t][h]);
                const float shrink = weight(most[t][h], both);
                most[t][h] = both;
                p[t][h] = weight(p[t][h], both);
                p[t][2 + h] = weight(p[t][2 + h], both);
                sum[t][h] = sum[t][h] * shrink + (p[t][h] + p[t][2 + h]);
#pragma unroll
                for (int step = 0; step < S::kSteps; step++) {
                    out[t][step][h] *= shrink;
                    out[t][step][2 + h] *= shrink;
                }
            }
    }

    __device__ __forceinline__ void add_values(uint32_t slot) {
        uint32_t high[S::kTiles][2], low[S::kTiles][2];
#pragma unroll
        for (int t = 0; t < S::kTiles; t++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float a = p[t][2 * half], b = p[t][2 * half + 1];
                high[t][half] = transposed_pair<T>(a, b);
                low[t][half] = transposed_pair<T>(a - round_to<T>(a), b - round_to<T>(b));
            }
#pragma unroll
        for (int step = 0; step < S::kSteps; step++) {
            uint32_t v[4];
            ldmatrix_x4_trans(v, slot + chunk_at<S>(lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
#pragma unroll
            for (int t = 0; t < S::kTiles; t++) {
                mma_m16n8k16<T>(out[t][step], v, high[t][0], high[t][1]);
                mma_m16n8k16<T>(out[t][step], v, low[t][0], low[t][1]);
            }
        }
    }

    /* Leaves it in shared memory. extra: 0, or NaN. */
    __device__ __forceinline__ void store(float2 *found, float *to, int group, float extra) {
#pragma unroll
        for (int t = 0; t < S::kTiles; t++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float all = sum[t][h] + extra;
#pragma unroll
                for (int lanes = 4; lanes < 32; lanes *= 2) all += __shfl_xor_sync(0xffffffffu, all, lanes);
                const int head = t * kTileHeads + lane % 4 * 2 + h;
                if (head >= group) continue;
                if (lane < 4) found[head] = {most[t][h], all};
#pragma unroll
                for (int step = 0; step < S::kSteps; step++) {
                    float *const at = to + head * S::kOutStride + step * 16 + lane / 4;
                    at[0] = out[t][step][h];
                    at[8] = out[t][step][2 + h];
                }
            }
    }
};

/* ---- merging ----------------------------------------------------------------------------------------------------- */

/* Merges `count` softmaxes, kAtOnce at a time: found(i) has m and the sum of the i-th, out(i) four columns of
 * sum p_j v_j. */
template <int kAtOnce, typename Found, typename Out>
__device__ __forceinline__ Softmax<4> merge(int count, Found found, Out out) {
    Softmax<4> all;
#pragma unroll 1
    for (int first = 0; first < count; first += kAtOnce)
#pragma unroll
        for (int i = 0; i < kAtOnce; i++)
            if (first + i < count) all.most = fmaxf(all.most, found(first + i).x);
#pragma unroll 1
    for (int first = 0; first < count; first += kAtOnce)
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
            if (first + i >= count) continue;
            const float2 of = found(first + i);
            const float shrink = weight(of.x, all.most);
            const float4 four = out(first + i);
            all.sum += shrink * of.y;
            all.out[0] += shrink * four.x, all.out[1] += shrink * four.y;
            all.out[2] += shrink * four.z, all.out[3] += shrink * four.w;
        }
    return all;
}

/* The result: four columns of it. */
template <typename T> __device__ __forceinline__ void store_result(const mv_task &task, int sequence, int head,
                                                                   int column, const Softmax<4> &all) {
    T *const to = head_address<T>(task, task.out, sequence, head) + column;
    const float inverse = 1 / all.sum; /* of a sum of at least 1, or of 0: then the result is NaN */
#pragma unroll
    for (int i = 0; i < 4; i++) to[i] = from_float<T>(all.out[i] * inverse);
}

/* Who a block is. */
struct Who {
    int sequence, kv_head, first_head, group, piece;
    __device__ __forceinline__ Who(const mv_task &task, const Cut &cut) {
        unsigned block = blockIdx.x;
        const auto next = [&](unsigned size) {
            const unsigned whole = block / size, rest = block - whole * size;
            block = whole;
            return static_cast<int>(rest);
        };
        piece = next(cut.pieces);
        const int pass = cut.passes == 1 ? 0 : next(cut.passes);
        kv_head = next(static_cast<unsigned>(task.attention.kv_heads));
        sequence = static_cast<int>(block);
        first_head = kv_head * cut.of_head + pass * cut.group;
        group = min(cut.group, cut.of_head - pass * cut.group);
        writes_new = pass == 0;
    }
    bool writes_new;
};

/* Who merges what in a cluster of 1 << log blocks: four columns of a head are a unit, and block i has every so manyth
 * from the i-th on. */
template <typename S> struct Shares {
    int units, log;
    __device__ __forceinline__ Shares(const Cut &cut, int group)
        : units(group * S::kColumns / 4), log(cut.log_cluster) {}
    __device__ __forceinline__ int most() const { return of(0); }
    __device__ __forceinline__ int of(int block) const { return (units - block + (1 << log) - 1) >> log; }
    __device__ __forceinline__ int block_of(int unit) const { return unit & ((1 << log) - 1); }
    __device__ __forceinline__ int place_of(int unit) const { return unit >> log; }
    __device__ __forceinline__ int unit_of(int block, int place) const { return (place << log) + block; }
};

/* Merges what the warps have found: the result, or what the other blocks get, or what the second launch does. */
template <typename S> __device__ __forceinline__ void merge_warps(const mv_task &task, const Cut &cut, const Who &who,
                                                                  Memory<S> &memory, const char *rings) {
    constexpr int kUnits = S::kColumns / 4; /* of a head */
    const int dim = static_cast<int>(task.hidden);
    const Partials partials(task, cut.pieces);
#pragma unroll 1
    for (int i = threadIdx.x; i < who.group * kUnits; i += S::kThreads) {
        const int h = i / kUnits, unit = i % kUnits, column = unit * 4;
        const Softmax<4> all = merge<S::kWarps>(
            S::kWarps, [&](int warp) { return memory.found[warp][h]; },
            [&](int warp) {
                return reinterpret_cast<const float4 *>(rings + warp * cut.ring)[h * (S::kOutStride / 4) + unit];
            });
        if constexpr (S::kHopper)
            if (cut.cluster) {
                const Shares<S> shares(cut, who.group);
                const int to = shares.block_of(i);
                const auto there = [&](const void *here, int block) {
                    return cluster_address(shared_address(here), static_cast<uint32_t>(block));
                };
                send_to_cluster(there(&memory.sent_out[who.piece * shares.most() + shares.place_of(i)], to), all.out,
                                there(&memory.all_sent, to));
                if (unit < cut.cluster) /* each block has to know m and the sum */
                    send_to_cluster(there(&memory.sent_found[who.piece][h], unit), all.most, all.sum,
                                    there(&memory.all_sent, unit));
                continue;
            }
        if (column >= dim) continue;
        if (!is_merged_later(cut)) {
            store_result<typename S::T>(task, who.sequence, who.first_head + h, column, all);
            continue;
        }
        const int64_t place = (who.sequence * task.attention.heads + who.first_head + h) * cut.pieces + who.piece;
#pragma unroll
        for (int c = 0; c < 4; c++) partials.out[place * dim + column + c] = all.out[c];
        if (column == 0) partials.found[place] = {all.most, all.sum};
    }
}

/* Merges the block's share of what so many blocks of its cluster have sent. */
template <typename S> __device__ __forceinline__ void merge_cluster(const mv_task &task, const Cut &cut, const Who &who,
                                                                    const Memory<S> &memory, int pieces) {
    constexpr int kUnits = S::kColumns / 4;
    const Shares<S> shares(cut, who.group);
#pragma unroll 1
    for (int i = threadIdx.x; i < shares.of(who.piece); i += S::kThreads) {
        const int unit = shares.unit_of(who.piece, i), h = unit / kUnits, column = unit % kUnits * 4;
        if (column >= task.hidden) continue;
        const Softmax<4> all = merge<4>(
            pieces, [&](int piece) { return memory.sent_found[piece][h]; },
            [&](int piece) { return memory.sent_out[piece * shares.most() + i]; });
        store_result<typename S::T>(task, who.sequence, who.first_head + h, column, all);
    }
}

/* ---- the kernel -------------------------------------------------------------------------------------------------- */

template <typename S> __global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    attention_mma_kernel(const __grid_constant__ mv_task task, const __grid_constant__ Cut cut) {
    using T = typename S::T;
    extern __shared__ __align__(16) char smem[];
    Memory<S> &memory = *reinterpret_cast<Memory<S> *>(smem + S::kWarps * cut.ring);
    const mv_attention &a = task.attention;
    const Who who(task, cut);
    const int warp = static_cast<int>(threadIdx.x / 32), lane = threadIdx.x % 32;

    if constexpr (S::kHopper)
        if (cut.cluster) {
            if (threadIdx.x == 0) {
                mbarrier_init(shared_address(&memory.all_sent), 1);
                mbarrier_init_fence();
            }
            cluster_barrier_arrive();
        }
    griddepcontrol_launch();
    char *const slots = smem + warp * cut.ring;
    const uint32_t slots_at = shared_address(slots);
    Ring<S> ring(task, cut, who.sequence, who.kv_head);
    HeadQueue<S> heads(task, who.sequence, who.kv_head, who.first_head, who.group);
    constexpr int kApart = S::kWarps * kTileKeys;
    constexpr int kValues = (S::kColumns + S::kThreads - 1) / S::kThreads; /* of the new value, of a thread */
    T new_value[kValues];
    Place place = {-1, 0}; /* whose keys are on their way */
    Keys keys;
    int first = 0, end = 0;
    uint32_t rows = kNoRow; /* of the next tile to bring */
    const bool early = static_cast<int>(blockIdx.x) < cut.early, early_rows = early && cut.early_rows;
    if (early) heads.prefetch_first();
    if (early && !early_rows) prefetch_tiles<S>(task, cut, who.sequence, who.kv_head, who.piece);
#pragma unroll 1
    for (bool waited = !early_rows;; waited = true) {
        /* Once before the wait, where older rows are promised to be static: the keys are asked for that follow from
         * what the position was. And once after it: if the position is another one now, so are the keys. */
        if (waited) griddepcontrol_wait();
        const Place now = waited ? load_place(task, who.sequence) : load_place<When::kToAim>(task, who.sequence);
        if (waited) {
            heads.load_first();
            const T *const value_row = heads.kv_row(a.v);
#pragma unroll
            for (int i = 0; i < kValues; i++) {
                const int column = static_cast<int>(threadIdx.x) + i * S::kThreads;
                new_value[i] = column < task.hidden ? value_row[column] : from_float<T>(0);
            }
        }
        if (!(now == place)) {
            place = now;
            keys = Keys(task, place, cut.pieces, kLeastOfPiece);
            first = who.piece * keys.piece, end = min(first + keys.piece, keys.count);
            if (waited) cp_async_wait<0>(); /* for what comes of the wrong keys */
            if (keys.count > 0 && first < end) ring.fill(keys, first + warp * kTileKeys, end, slots_at, rows);
        }
        if (waited) break;
    }
    if (keys.count <= 0 || (first >= end && !cut.cluster)) {
        if constexpr (S::kHopper)
            if (cut.cluster) cluster_barrier_wait();
        write_empty<T>(task, cut, keys, who.sequence, who.first_head, who.group, who.piece);
        return;
    }

    if (first < end) {
        const bool has_new = end == keys.count;
        int key = first + warp * kTileKeys;
        const bool whole = S::kCommon || !has_new || has_all_pages(task, cut, keys, who.sequence);
        heads.finish(memory, has_new);
#pragma unroll
        for (int i = 0; i < kValues; i++) {
            const int column = static_cast<int>(threadIdx.x) + i * S::kThreads;
            if (column < S::kColumns) memory.new_value[column] = new_value[i];
        }
        __syncthreads();
        if (has_new && whole && who.writes_new && warp < 2 && lane < task.hidden / 8) {
            const CacheRow row(task, cut, keys, who.sequence, keys.count - 1);
            reinterpret_cast<uint4 *>(row.of<T>(warp ? a.values : a.keys, who.kv_head))[lane] =
                reinterpret_cast<const uint4 *>(warp ? memory.new_value : memory.new_key)[lane];
        }

        const bool has_low = task.rounding == MV_ROUNDING_FP32 && (a.q_norm.weight || a.rotary.columns);
        WarpSoftmax<S> softmax(memory, who.group, has_low);
        const float scale = a.scale * kLog2OfE, soft_cap = a.soft_cap * kLog2OfE;
        int slot = 0; /* of the tile's keys; the values are in the one behind it */
#pragma unroll 1
        for (; key < end; key += kApart) {
            const bool is_last = has_new && end - key <= kTileKeys;
            const int later = key + S::kAhead * kApart;
            const uint32_t keys_at = slots_at + slot * S::kUnitBytes, values_at = keys_at + S::kUnitBytes;
            cp_async_wait<S::kSlots - 1>();
            __syncwarp();
            if (is_last) place_new<S>(slots + slot * S::kUnitBytes, end - 1 - key, memory.new_key);
            softmax.multiply_keys(keys_at);
            softmax.add_scores(end - key, scale, soft_cap);
            cp_async_wait<S::kSlots - 2>();
            __syncwarp();
            if (is_last) place_new<S>(slots + (slot + 1) * S::kUnitBytes, end - 1 - key, memory.new_value);
            softmax.add_values(values_at);
            __syncwarp();
            const uint32_t coming = rows;
            rows = ring.row_of(later + kApart);
            ring.bring(later, end, coming, keys_at);
            slot = slot + 2 == S::kSlots ? 0 : slot + 2;
        }
        softmax.store(memory.found[warp], reinterpret_cast<float *>(slots), who.group, whole ? ring.missing : NAN);
        __syncthreads();
    }

    const int pieces = (keys.count + keys.piece - 1) / keys.piece; /* that have keys */
    const uint32_t all_sent = shared_address(&memory.all_sent);
    if constexpr (S::kHopper)
        if (cut.cluster) {
            cluster_barrier_wait();
            const int bytes = Shares<S>(cut, who.group).of(who.piece) * 16 + who.group * 8;
            if (threadIdx.x == 0) mbarrier_arrive_expect(all_sent, static_cast<uint32_t>(pieces * bytes));
        }
    if (first < end) merge_warps<S>(task, cut, who, memory, smem);
    if constexpr (S::kHopper)
        if (cut.cluster) {
            mbarrier_wait(all_sent, 0);
            merge_cluster<S>(task, cut, who, memory, pieces);
        }
}

/* ---- host -------------------------------------------------------------------------------------------------------- */

/* Keys of a sequence at most, and of a piece. */
int64_t most_keys(const mv_task *task) { return least(task->attention.rows, task->attention.window); }
int64_t most_of_piece(const mv_task *task, const Cut &cut) {
    const int64_t even = parts(most_keys(task), cut.pieces);
    return even > kLeastOfPiece ? even : kLeastOfPiece;
}

/* Bytes of a warp's ring: as many tiles as a warp may have, up to kAhead, so that a block leaves room for those of the
 * kernels around it. */
template <typename S> int32_t ring_bytes(const mv_task *task, const Cut &cut) {
    constexpr int64_t tile_bytes = 2 * S::kUnitBytes, least_tiles = (S::kSumBytes + tile_bytes - 1) / tile_bytes;
    const int64_t tiles = least(parts(most_of_piece(task, cut), S::kWarps * kTileKeys), S::kAhead);
    return static_cast<int32_t>((tiles > least_tiles ? tiles : least_tiles) * tile_bytes);
}

template <typename S> mv_status launch_instance(const mv_task *task, const mv_decision *decision, mv_error *error) {
    Cut cut = cut_of<Cut>(decision);
    cut.ring = ring_bytes<S>(task, cut);
    while (1 << cut.log_cluster < cut.cluster) cut.log_cluster++;
    const mv_attention &a = task->attention;
    const Grid grid = {static_cast<unsigned>(task->tokens / a.heads * a.kv_heads * cut.passes * cut.pieces),
                       S::kThreads, shared_bytes<S>(cut.ring), static_cast<unsigned>(cut.cluster)};
    const mv_status status = launch<attention_mma_kernel<S>>(task, grid, error, *task, cut);
    return status == MV_OK ? launch_merge<typename S::T>(task, cut, error) : status;
}

/* An instance as the host knows it: what it launches, the blocks that an SM has room for, what each needs. */
struct Known {
    mv_kernel *launch;
    int blocks;
    size_t shared_bytes;
};
template <typename S>
constexpr Known known = {launch_instance<S>, S::kBlocks, shared_bytes<S>(S::kSlots *S::kUnitBytes)};

template <typename T, int kColumns, bool kHopper, bool kCommon> Known for_group(int group) {
    return group <= kTileHeads ? known<Instance<T, kColumns, 1, kHopper, kCommon>>
                               : known<Instance<T, kColumns, 2, kHopper, kCommon>>;
}
template <typename T, bool kHopper> Known instance_for(int64_t dim, int group, bool common) {
    if (common)
        return dim == 64    ? for_group<T, 64, kHopper, true>(group)
               : dim == 128 ? for_group<T, 128, kHopper, true>(group)
                            : for_group<T, 256, kHopper, true>(group);
    return dim <= 64    ? for_group<T, 64, kHopper, false>(group)
           : dim <= 96  ? for_group<T, 96, kHopper, false>(group)
           : dim <= 128 ? for_group<T, 128, kHopper, false>(group)
                        : for_group<T, 256, kHopper, false>(group);
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
    const bool is_alone = task->tokens == a.heads; /* then no row is a sequence further */
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

template <typename T, bool kHopper> const char *decide_mma(const mv_task *task, double below, mv_decision *decision) {
    const mv_attention &a = task->attention;
    const double bytes = static_cast<double>(task->tokens / a.heads * a.kv_heads) * bytes_of_head(task);
    const double us = kHopper ? prices::attention_clusters_us(task, bytes) : prices::attention_mma_us(task, bytes);
    if (!mv_at_price(decision, us, below)) return mv_too_dear;
    if (task->hidden % 8 != 0 || task->hidden > 256) return "it takes heads of 8, 16, 24, .. 256 columns";
    if (Dtype<T>::value == MV_F16 && task->rounding == MV_ROUNDING_FP32 && (a.q_norm.weight || a.rotary.columns))
        return "queries that are not rounded may be too large for float16";
    if (!cache_aligned(a.keys, 8) || !cache_aligned(a.values, 8)) return "rows of the caches are not 16-byte aligned";
    if (!is_near(task, a.keys) || !is_near(task, a.values)) return "rows of the caches are 64 GB apart, or backwards";
    Cut cut = cut_of_heads(task, kMostHeadsOfBlock);
    const Known instance = instance_for<T, kHopper>(task->hidden, cut.group, is_common(task));
    if (instance.shared_bytes > static_cast<size_t>(task->smem_bytes))
        return "the GPU has too little shared memory for heads this wide";
    choose_cut(task, kHopper, instance.blocks, cut);
    cut.early = task->programmatic_launch ? instance.blocks * task->sm_count : 0;
    cut.early_rows = a.static_rows && !a.block_table;
    decision->launch = instance.launch;
    decision->workspace = workspace_bytes(task, cut);
    keep_cut(decision, cut);
    return nullptr;
}

template <bool kHopper> const char *decide_mma(const mv_task *task, double below, mv_decision *decision) {
    return task->dtype == MV_F16 ? decide_mma<__half, kHopper>(task, below, decision)
                                 : decide_mma<__nv_bfloat16, kHopper>(task, below, decision);
}

} // namespace
