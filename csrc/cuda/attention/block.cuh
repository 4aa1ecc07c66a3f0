/* block.cuh: what a block of decode_attention_sm80.cu does: which warp has which heads and keys, the making
 * of its queries, and the reading of its keys and values. */
#pragma once

#include "cuda/attention/head.cuh"
#include "cuda/attention/keys.cuh"
#include "cuda/attention/softmax.cuh"

namespace {

constexpr int kWarps = 8, kThreads = kWarps * 32;

/* The share of a warp: kHeads of the block's query heads from `head` on, and every slots-th stretch of the keys. */
template <typename S> struct HeadShare {
    int head, slot, slots;
    __host__ __device__ __forceinline__ HeadShare(int group, int warp) {
        const int warps = (group + S::kHeads - 1) / S::kHeads; /* that see the same keys */
        slots = kWarps / warps;
        slot = warp / warps; /* == slots: nothing is left for this warp */
        head = warp % warps * S::kHeads;
    }
};

/* A block's shared memory: its queries, the new key and value, and what each slot has found. */
template <typename S> struct AttentionShared {
    float *queries; /* [group][kColumns], zeros from dim on */
    Packet<typename S::T> *new_key, *new_value;
    float2 *found; /* [slots][group]: m and sum p_j */
    float *out;    /* [slots][group][kColumns]: sum p_j v_j */
    size_t bytes;

    __host__ __device__ __forceinline__ AttentionShared(char *memory, int group) {
        const int parts = HeadShare<S>(group, 0).slots * group;
        queries = reinterpret_cast<float *>(memory);
        out = queries + group * S::kColumns;
        new_key = reinterpret_cast<Packet<typename S::T> *>(out + parts * S::kColumns);
        new_value = new_key + S::kColumns / S::kSize;
        found = reinterpret_cast<float2 *>(new_value + S::kColumns / S::kSize);
        bytes = static_cast<size_t>(reinterpret_cast<char *>(found + parts) - memory);
    }
};

/* The heads that go through norm and rotary embedding in a block: its queries, then the new key. A warp has every
 * kWarps-th of them, and asks for its first before the position is known. */
template <typename S> struct Heads {
    using T = typename S::T;
    using Columns = Head<T, S::kColumns / 32>;
    const mv_task &task;
    const int sequence, kv_head, first_head, group; /* queries are heads [first_head, first_head + group) */
    Columns of;                                     /* the head that was loaded last */

    __device__ __forceinline__ Heads(const mv_task &task, int sequence, int kv_head, int first_head, int group)
        : task(task), sequence(sequence), kv_head(kv_head), first_head(first_head), group(group) {
        if (warp() <= group) load(warp());
    }
    static __device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x / 32); }
    __device__ __forceinline__ const T *kv_row(const mv_rows &rows) const {
        return static_cast<const T *>(rows.data) + sequence * rows.outer_stride + kv_head * rows.inner_stride;
    }

    __device__ __forceinline__ const mv_head_norm &norm_of(int h) const {
        return h < group ? task.attention.q_norm : task.attention.k_norm;
    }
    __device__ __forceinline__ void load(int h) {
        const mv_attention &a = task.attention;
        const T *x = h < group ? head_address<const T>(task, task.x, sequence, first_head + h) : kv_row(a.k);
        of.load(x, static_cast<int>(task.hidden), norm_of(h), a.rotary, sequence);
    }
    __device__ __forceinline__ void finish(int h, float *y) {
        of.finish(static_cast<int>(task.hidden), norm_of(h), task.attention.rotary, task.rounding, y, S::kColumns);
    }

    /* Leaves the queries in shared memory, and for the piece that has the new token also its key and value. All threads
     * must call it. */
    __device__ __forceinline__ void finish_all(const AttentionShared<S> &shared, bool has_new) {
        float *const key = shared.out; /* not in use yet */
        const int count = has_new ? group + 1 : group;
#pragma unroll 1
        for (int h = warp(); h < count; h += kWarps) {
            if (h >= kWarps) load(h);
            finish(h, h < group ? shared.queries + h * S::kColumns : key);
            if (h < group) continue;
#pragma unroll 1
            for (int i = threadIdx.x % 32; i < S::kColumns; i += 32)
                reinterpret_cast<T *>(shared.new_key)[i] = from_float<T>(key[i]);
        }
        if (!has_new) return;
        const int dim = static_cast<int>(task.hidden);
        const T *value = kv_row(task.attention.v);
#pragma unroll 1
        for (int i = threadIdx.x; i < S::kColumns; i += kThreads)
            reinterpret_cast<T *>(shared.new_value)[i] = i < dim ? value[i] : from_float<T>(0);
    }
};

/* A warp's keys of [key, end) in the cache, a stretch at a time. It holds the stretch that was asked for last. */
template <typename S> struct Stretches {
    using T = typename S::T;
    const mv_task &task;
    const Cut &cut;
    const Keys &keys;
    const int sequence, kv_head, apart, end; /* apart: keys from a stretch of this warp to its next */
    int key;                                 /* the first of the stretch */
    float missing = 0;                       /* NaN once there was no page for a key */
    Row<S> k[S::kUnroll], v[S::kUnroll];
    bool there[S::kUnroll];
    const T *value_at[S::kUnroll];

    __device__ __forceinline__ Stretches(const mv_task &task, const Cut &cut, const Keys &keys, int sequence,
                                         int kv_head, const HeadShare<S> &share, int first, int end)
        : task(task), cut(cut), keys(keys), sequence(sequence), kv_head(kv_head), apart(share.slots * S::kStretch),
          end(end), key(first + share.slot * S::kStretch) {
        ask_for_keys();
        ask_for_values();
    }
    __device__ __forceinline__ bool any() const { return key < end; }

    __device__ __forceinline__ void ask_for_keys() {
        if (!any()) return;
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int u = 0; u < S::kUnroll; u++) {
            const int at = key + u * S::kRows + lane / S::kLanes;
            const CacheRow row(task, cut, keys, sequence, min(at, end - 1));
            if (row.block < 0) missing = NAN;
            there[u] = at < end && row.block >= 0;
            value_at[u] = row.of<const T>(task.attention.values, kv_head);
            load_row<S>(k[u], row.of<const T>(task.attention.keys, kv_head), lane % S::kLanes,
                        static_cast<int>(task.hidden), there[u]);
        }
    }
    __device__ __forceinline__ void ask_for_values() {
        if (!any()) return;
#pragma unroll
        for (int u = 0; u < S::kUnroll; u++)
            load_row<S>(v[u], value_at[u], threadIdx.x % S::kLanes, static_cast<int>(task.hidden), there[u]);
    }

    __device__ __forceinline__ void add_to(Attention<S> &attention) {
        while (any()) {
            typename Attention<S>::template Scores<S::kUnroll> scores;
            attention.add_scores(scores, k, there);
            key += apart;
            ask_for_keys();
            attention.add_values(scores, v);
            ask_for_values();
        }
    }
};

} // namespace
