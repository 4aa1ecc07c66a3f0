/* products.cuh: a warp's products of attention on tensor cores, and its softmax between them. */
#pragma once

#include "cuda/attention/ring.cuh"

namespace {

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
                if (!has_low) continue;
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

} // namespace
