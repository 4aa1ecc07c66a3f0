/* softmax.cuh: what the lanes of a warp compute: scores, and a softmax over the keys met so far. */
#pragma once

#include "cuda/arch/reduce.cuh"
#include "cuda/arch/vec.cuh"

namespace {

/* An instance. A key or a value is read by a group of kLanes lanes, each of which takes kPackets packets of it, for
 * kHeads query heads. kWhole: the rows of the caches are whole aligned packets. */
template <typename T_, int kLanes_, int kPackets_, int kHeads_, bool kWhole_> struct Shape {
    using T = T_;
    static constexpr int kLanes = kLanes_, kPackets = kPackets_, kHeads = kHeads_;
    static constexpr bool kWhole = kWhole_;
    static constexpr int kSize = Packet<T>::size, kValues = kPackets * kSize, kColumns = kLanes * kValues;
    static constexpr int kRows = 32 / kLanes;      /* keys of a warp, side by side */
    static constexpr int kSums = kHeads * kValues; /* of p_j v_j that a lane keeps in registers */
    /* Keys that each group of lanes loads at a time: fewer where the sums leave fewer registers. */
    static constexpr int kUnroll = kPackets > 2 ? 1 : kSums > 16 ? 2 : 4;
    static constexpr int kStretch = kRows * kUnroll; /* keys that a warp loads at a time */
    /* Blocks that the registers of an SM have room for. */
    static constexpr int kBlocks = kPackets == 1 && (kHeads <= 2 || sizeof(T_) == 2) ? 2 : 1;
};

template <typename S> using Row = Packet<typename S::T>[S::kPackets];

/* Loads a lane's packets of a row. They are zeros past the row's end, and everywhere if the row is not wanted. */
template <typename S>
__device__ __forceinline__ void load_row(Row<S> &row, const typename S::T *from, int member, int dim, bool wanted) {
#pragma unroll
    for (int p = 0; p < S::kPackets; p++) {
        const int at = (p * S::kLanes + member) * S::kSize;
        if constexpr (S::kWhole)
            row[p] = as_packet<typename S::T>(load_if(from + at, wanted && at < dim));
        else
            row[p] = load_packet(from + at, wanted ? dim - at : 0, false);
    }
}

/* exp(a - m), where both are base-2 logarithms. m is -infinity where there was no key, or only scores of -infinity:
 * then every weight is 0. */
__device__ __forceinline__ float weight(float a, float most) { return exp2f(a - (most == -INFINITY ? 0 : most)); }

/* A softmax over some keys for one query head, of which a lane has kValues columns. */
template <int kValues> struct Softmax {
    float most = -INFINITY, sum = 0, out[kValues] = {};

    /* Merges it with that of the lane `lanes` away, which has the same columns over other keys. */
    __device__ __forceinline__ void merge_with_lane(int lanes) {
        const float both = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, lanes)), shrink = weight(most, both);
        most = both;
        sum *= shrink;
        sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
#pragma unroll
        for (int i = 0; i < kValues; i++) {
            out[i] *= shrink;
            out[i] += __shfl_xor_sync(0xffffffffu, out[i], lanes);
        }
    }
};

/* A lane's part of a warp's query heads: its columns of the queries, and of what they have found. */
template <typename S> struct Attention {
    using T = typename S::T;
    float q[S::kHeads][S::kValues];
    Softmax<S::kValues> head[S::kHeads];
    float scale, soft_cap; /* of base-2 logarithms: both include log2(e) */

    __device__ __forceinline__ float score(int h, const Row<S> &key) const {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < S::kValues; i++) sum = fmaf(q[h][i], key[i / S::kSize].get(i % S::kSize), sum);
        return warp_sum<S::kLanes>(sum) * scale;
    }

    template <int kCount> using Scores = float[S::kHeads][kCount];

    /* Keys that are not there get no weight. The soft cap comes last, so that calls without one jump over its code. */
    template <int kCount> __device__ __forceinline__ void
    add_scores(Scores<kCount> &scores, const Row<S> (&keys)[kCount], const bool (&there)[kCount]) const {
#pragma unroll
        for (int h = 0; h < S::kHeads; h++)
#pragma unroll
            for (int u = 0; u < kCount; u++) {
                const float found = score(h, keys[u]); /* it shuffles: all lanes must call it */
                scores[h][u] = there[u] ? found : -INFINITY;
            }
        if (soft_cap == 0) return;
#pragma unroll
        for (int h = 0; h < S::kHeads; h++)
#pragma unroll
            for (int u = 0; u < kCount; u++)
                if (there[u]) scores[h][u] = soft_cap * tanhf(scores[h][u] / soft_cap);
    }

    template <int kCount>
    __device__ __forceinline__ void add_values(const Scores<kCount> &scores, const Row<S> (&values)[kCount]) {
#pragma unroll
        for (int h = 0; h < S::kHeads; h++) {
            Softmax<S::kValues> &of = head[h];
            float most = of.most;
#pragma unroll
            for (int u = 0; u < kCount; u++) most = fmaxf(most, scores[h][u]);
            const float shrink = weight(of.most, most);
            of.most = most;
            of.sum *= shrink;
#pragma unroll
            for (int i = 0; i < S::kValues; i++) of.out[i] *= shrink;
#pragma unroll
            for (int u = 0; u < kCount; u++) {
                const float p = weight(scores[h][u], most);
                of.sum += p;
#pragma unroll
                for (int i = 0; i < S::kValues; i++)
                    of.out[i] = fmaf(p, values[u][i / S::kSize].get(i % S::kSize), of.out[i]);
            }
        }
    }
};

} // namespace
