/* keys.cuh: which keys a sequence has, how they are cut into pieces, and where the caches have them. */
#pragma once

#include "cuda/arch/ptx.cuh"
#include "kernel.h"

namespace {

constexpr int kLeastKeys = 64; /* of a piece: fewer are not worth a block */

/* How a call is cut into blocks. */
struct Cut {
    int32_t pieces;      /* of a sequence's keys, at most */
    int32_t passes;      /* blocks that share a key-value head, because it has too many query heads for one */
    int32_t group;       /* query heads of a block */
    int32_t of_head;     /* query heads of a key-value head */
    int32_t early;       /* blocks that may begin while the kernel in front still runs */
    bool early_rows;     /* those may load older rows then, not only ask L2 for them */
    int32_t cluster;     /* blocks that merge the pieces of a sequence in one launch; 0: a second one does */
    int32_t log_cluster; /* of a cluster's size, which is a power of two */
    int32_t ring;        /* bytes of shared memory for each warp's keys and values, where they go through it */
    int32_t shift;       /* row / page == row * reciprocal >> 30 + shift, for rows below 2^30 */
    uint64_t reciprocal;
};

/* When something is read: once the kernel in front is done, or before, to aim a prefetch. */
enum class When { kAfterWait, kToAim };
template <When kWhen, typename T> __device__ __forceinline__ T load_when(const T *p) {
    if constexpr (kWhen == When::kToAim) return load_to_aim(p);
    return *p;
}

template <When kWhen> __device__ __forceinline__ int64_t integer_at(mv_integers integers, int64_t i) {
    return integers.wide ? load_when<kWhen>(static_cast<const int64_t *>(integers.data) + i * integers.stride)
                         : load_when<kWhen>(static_cast<const int32_t *>(integers.data) + i * integers.stride);
}

/* Where a sequence's new token stands, and the first key that counts, as the GPU has them. */
struct SequencePlace {
    int64_t last, start;
    __device__ __forceinline__ bool operator==(const SequencePlace &other) const {
        return last == other.last && start == other.start;
    }
};
template <When kWhen = When::kAfterWait>
__device__ __forceinline__ SequencePlace load_place(const mv_task &task, int64_t sequence) {
    const mv_attention &a = task.attention;
    return {integer_at<kWhen>(a.positions, sequence), a.starts.data ? integer_at<kWhen>(a.starts, sequence) : 0};
}

/* The keys that a sequence's new token attends to. */
struct Keys {
    int count; /* the new token's key is the last. 0: the sequence is skipped; -1: it cannot be served */
    int piece; /* keys of a piece */
    int first; /* row of key 0, counted within the sequence */

    __device__ __forceinline__ Keys() : count(0), piece(0), first(0) {}
    __device__ __forceinline__ Keys(const mv_task &task, SequencePlace place, int pieces,
                                    int least_of_piece = kLeastKeys)
        : Keys() {
        const mv_attention &a = task.attention;
        const int64_t last = place.last, start = place.start;
        if (last < 0) return;
        const int64_t from = max(max(start, last - a.window + 1), int64_t{0});
        count = -1;
        if (start > last || (!a.ring && last >= a.rows)) return;
        count = static_cast<int>(last - from) + 1;
        piece = max(least_of_piece, (count + pieces - 1) / pieces);
        first = static_cast<int>(a.ring ? from % a.rows : from);
    }
};

/* Where the caches have a key and its value: a row of a page or, without a block table, of a sequence. */
template <When kWhen> struct CacheRowAt {
    int block, row; /* block < 0: the sequence has no page for this key */

    __device__ __forceinline__ CacheRowAt(const mv_task &task, const Cut &cut, const Keys &keys, int sequence,
                                          int key) {
        const mv_attention &a = task.attention;
        row = keys.first + key;
        if (row >= a.rows) row -= static_cast<int>(a.rows); /* the ring begins again */
        block = sequence;
        if (!a.block_table) return;
        const int page = static_cast<int>((static_cast<uint64_t>(row) * cut.reciprocal) >> (30 + cut.shift));
        row -= page * static_cast<int>(a.block_rows);
        block = load_when<kWhen>(a.block_table + sequence * a.table_stride + page);
        if (block >= a.blocks) block = -1;
    }
    template <typename T> __device__ __forceinline__ T *of(const mv_cache &cache, int head) const {
        return static_cast<T *>(cache.data) + block * cache.block_stride + row * cache.row_stride +
               head * cache.head_stride;
    }
};

using CacheRow = CacheRowAt<When::kAfterWait>;

/* Where head h of a sequence is in x or out, whose rows are the heads of all sequences. */
template <typename T>
__device__ __forceinline__ T *head_address(const mv_task &task, const mv_rows &rows, int sequence, int64_t h) {
    const int64_t heads = task.attention.heads;
    T *const data = static_cast<T *>(rows.data);
    if (task.inner == heads) return data + sequence * rows.outer_stride + h * rows.inner_stride;
    return data + (sequence * heads + h) * rows.inner_stride; /* all rows are equally far apart */
}

/* Has the sequence a page for each of its keys? All threads must call it. */
__device__ __forceinline__ bool has_all_pages(const mv_task &task, const Cut &cut, const Keys &keys, int sequence) {
    __shared__ int missing;
    if (!task.attention.block_table) return true;
    if (threadIdx.x == 0) missing = 0;
    __syncthreads();
    const int page = static_cast<int>(task.attention.block_rows), blocks = (keys.first % page + keys.count - 1) / page;
    for (int i = threadIdx.x; i <= blocks; i += static_cast<int>(blockDim.x)) {
        const int key = max(0, i * page - keys.first % page);
        if (CacheRow(task, cut, keys, sequence, key).block < 0) missing = 1;
    }
    __syncthreads();
    return !missing;
}

} // namespace
