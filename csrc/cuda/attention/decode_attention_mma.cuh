/* decode_attention_mma.cuh: one new token per sequence against its cache, on tensor cores: the kernel of the files
 * decode_attention_mma_*.cu. ring.cuh has the way of its keys and values, products.cuh what is computed with them,
 * cut.cuh how a call is cut into blocks.
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

#include "cuda/arch/tma.cuh"
#include "cuda/attention/products.cuh"

namespace {

/* ---- heads ------------------------------------------------------------------------------------------------------- */

/* The heads that go through norm and rotary embedding in a block: its queries, then the new key. A warp has every
 * fourth of them, asks for its first before the position is known, and for each other one before it is done with the
 * one in front. */
template <typename S> struct HeadQueue {
    using T = typename S::T;
    const mv_task &task;
    const int sequence, kv_head, first_head, group, warp;
    const bool has_low; /* queries are kept as two values: rounded, and what that leaves of them */
    typename S::OwnHead now = {};

    __device__ __forceinline__ HeadQueue(const mv_task &task, int sequence, int kv_head, int first_head, int group)
        : task(task), sequence(sequence), kv_head(kv_head), first_head(first_head), group(group),
          warp(static_cast<int>(threadIdx.x / 32)),
          has_low(task.rounding == MV_ROUNDING_FP32 &&
                  (task.attention.q_norm.weight || task.attention.rotary.columns)) {}
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

    /* Leaves the queries in shared memory, and for the piece that has the new token also its key. A rehearsal stops
     * after the warp's first head, of which nothing is loaded yet: what it leaves is overwritten. */
    __device__ __forceinline__ void finish(Memory<S> &memory, bool has_new, bool rehearsal) {
#pragma unroll 1
        for (int h = warp; h <= group; h += S::kWarps) {
            if (h == group && !has_new) return;
            typename S::OwnHead next = now;
            if (!rehearsal) load(next, h + S::kWarps);
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
                if (has_low)
                    memory.query[1][h][column] =
                        from_float<T>(isinf(to_float(rounded)) ? 0 : now.value[i] - to_float(rounded));
            }
            if (rehearsal) return;
            now = next;
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

/* Who merges what in a cluster of 1 << log blocks: four columns of a head are a unit, and the units go to the blocks in
 * turns. */
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
    KeyRing<S> ring(task, cut, who.sequence, who.kv_head);
    HeadQueue<S> heads(task, who.sequence, who.kv_head, who.first_head, who.group);
    constexpr int kApart = S::kWarps * kTileKeys;
    constexpr int kValues = (S::kColumns + S::kThreads - 1) / S::kThreads; /* of the new value, of a thread */
    T new_value[kValues];
    SequencePlace place = {-1, 0}; /* whose keys are on their way */
    Keys keys;
    int first = 0, end = 0;
    uint32_t rows = kNoRow; /* of the next tile to bring */
    const bool early = static_cast<int>(blockIdx.x) < cut.early, early_rows = early && cut.early_rows;
    if (early) heads.prefetch_first();
    if (early && !early_rows) prefetch_tiles<S>(task, cut, who.sequence, who.kv_head, who.piece);
#pragma unroll 1
    for (bool waited = !early_rows;; waited = true) {
        /* Once before the wait, where older rows are promised to be static: the keys are asked for that follow from
         * what the position was, and the heads' instructions come to the SM. And once after it: if the position is
         * another one now, so are the keys. */
        if (waited) griddepcontrol_wait();
        const SequencePlace now =
            waited ? load_place(task, who.sequence) : load_place<When::kToAim>(task, who.sequence);
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
        if (waited && (keys.count <= 0 || first >= end)) break;
        heads.finish(memory, !waited || end == keys.count, !waited);
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

        WarpSoftmax<S> softmax(memory, who.group, heads.has_low);
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
                       S::kThreads, attention_shared_bytes<S>(cut.ring), static_cast<unsigned>(cut.cluster)};
    const mv_status status = launch<attention_mma_kernel<S>>(task, grid, error, *task, cut);
    return status == MV_OK ? launch_merge<typename S::T>(task, cut, error) : status;
}

/* An instance as the host knows it: what it launches, the blocks that an SM has room for, their longest rings, and all
 * that each needs. */
struct KnownInstance {
    mv_kernel *launch;
    int blocks;
    size_t ring_bytes, shared_bytes;
};
template <typename S> constexpr KnownInstance known = {launch_instance<S>, S::kBlocks,
                                                       size_t{S::kWarps} * S::kSlots *S::kUnitBytes,
                                                       attention_shared_bytes<S>(S::kSlots *S::kUnitBytes)};

template <typename T, int kColumns, bool kHopper, bool kCommon> KnownInstance for_group(int group) {
    return group <= kTileHeads ? known<MmaInstance<T, kColumns, 1, kHopper, kCommon>>
                               : known<MmaInstance<T, kColumns, 2, kHopper, kCommon>>;
}
template <typename T, bool kHopper> KnownInstance instance_for(int64_t dim, int group, bool common) {
    if (common)
        return dim == 64    ? for_group<T, 64, kHopper, true>(group)
               : dim == 128 ? for_group<T, 128, kHopper, true>(group)
                            : for_group<T, 256, kHopper, true>(group);
    return dim <= 64    ? for_group<T, 64, kHopper, false>(group)
           : dim <= 96  ? for_group<T, 96, kHopper, false>(group)
           : dim <= 128 ? for_group<T, 128, kHopper, false>(group)
                        : for_group<T, 256, kHopper, false>(group);
}

template <typename T, bool kHopper> const char *decide_mma(const mv_task *task, double below, mv_decision *decision) {
    const mv_attention &a = task->attention;
    const double bytes = static_cast<double>(priced_sequences(task) * a.kv_heads) * bytes_of_head(task);
    if (!mv_at_price(decision, bytes / prices::memory_rate(task), below)) return mv_too_dear; /* at least */
    if (task->hidden % 8 != 0 || task->hidden > 256) return "it takes heads of 8, 16, 24, .. 256 columns";
    if (Dtype<T>::value == MV_F16 && task->rounding == MV_ROUNDING_FP32 && (a.q_norm.weight || a.rotary.columns))
        return "queries that are not rounded may be too large for float16";
    if (!cache_aligned(a.keys, 8) || !cache_aligned(a.values, 8)) return "rows of the caches are not 16-byte aligned";
    if (!is_near(task, a.keys) || !is_near(task, a.values)) return "rows of the caches are 64 GB apart, or backwards";
    Cut cut = cut_of_heads(task, kMostHeadsOfBlock);
    const KnownInstance instance = instance_for<T, kHopper>(task->hidden, cut.group, is_common(task));
    if (instance.shared_bytes > static_cast<size_t>(task->smem_bytes))
        return "the GPU has too little shared memory for heads this wide";
    const double us = choose_cut(task, kHopper, instance.blocks, static_cast<double>(instance.ring_bytes), cut);
    if (!mv_at_price(decision, us, below)) return mv_too_dear;
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
