/* decode_tokens.cuh: how a block of the decode kernel of Hopper (decode_sm90a.cu) reads its tokens and
 * normalises them into shared memory. Few stay in registers from the one to the other (Held); more are copied to where
 * y will be, read there, and normalised in place. */
#pragma once

#include "cuda/arch/reduce.cuh"
#include "cuda/linear/piece_product.cuh"
#include "cuda/norm/rms_norm.cuh"

namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kBatch = 4; /* packets of a token that a thread works on at a time */
constexpr int kMaxHeldTokens = 8, kFewHeld = 4, kMostHeld = 10; /* tokens and a thread's packets in registers */

using Squares = float (*)[kWarps];

/* How a launch is cut: blocks that follow each other have the same rows, each with a group of the tokens. */
struct DecodeSplit {
    int first_output, rows_per_block, more, unit; /* the first `more` shares have one unit of rows more */
    int log_groups, group_tokens;                 /* of the tokens */
    int log_threads;                              /* of the threads that share a token */
    int slots, slot_bytes;                        /* per warp: a slot is for 128 bytes of each row of a pass */
    int ring, norm_weight, y, parts;              /* where they begin in shared memory */
    int pass_rows;                                /* rows that a block multiplies at a time */
    bool one_pass;                                /* no block has more */
    bool resident;                                /* all that a warp multiplies has a slot */
    bool rehearses;                               /* the product is run once before the wait */
    float mean_scale;
    bool in_pairs; /* the norm weights multiply two 16-bit values at a time */
    int early;     /* slots that are filled before the tokens are asked for */
    int held;      /* packets of a token that each of its threads has */
};

/* Where rows start: the tokens of this kernel have one stride. */
template <typename T> __device__ __forceinline__ T *token_row(mv_rows rows, int token) {
    return static_cast<T *>(rows.data) + token * rows.inner_stride;
}

/* Where this thread begins in its block's `tokens`, of which `first` is the first. kLate: y has two rows of each. */
template <typename T, bool kLate> struct TokenShare {
    int first, tokens, token, column;
    const T *x, *residual;
    char *shared; /* a pointer that the compiler knows to be one to shared memory, and a place behind it */
    int y;

    __device__ __forceinline__ TokenShare(const mv_task &task, const DecodeSplit &split, int group, char *shared)
        : first(group * split.group_tokens), tokens(min(split.group_tokens, static_cast<int>(task.tokens) - first)),
          token(static_cast<int>(threadIdx.x) >> split.log_threads),
          column((threadIdx.x & ((1 << split.log_threads) - 1)) * Packet<T>::size),
          x(token_row<const T>(task.x, first + token) + column),
          residual(task.norm.residual.data ? token_row<const T>(task.norm.residual, first + token) + column : nullptr),
          shared(shared) {
        const int row = kLate ? 2 * token : token;
        y = split.y + row * static_cast<int>(task.hidden * sizeof(T)) + swapped(row, column / Packet<T>::size) * 16;
        compute_now(x);
        compute_now(residual);
        compute_now(y);
        compute_now(token);
        compute_now(column);
    }

    /* Of y, or of the tokens before they are that: k columns further on. */
    __device__ __forceinline__ Packet<T> &packet(int k) const {
        return *reinterpret_cast<Packet<T> *>(shared + y + k * static_cast<int>(sizeof(T)));
    }
    /* The same of the next row, which is an odd one. */
    __device__ __forceinline__ Packet<T> &next_packet(int k, int hidden) const {
        return *reinterpret_cast<Packet<T> *>(shared + (y + hidden * static_cast<int>(sizeof(T)) ^ 64) +
                                              k * static_cast<int>(sizeof(T)));
    }
};

/* Starts to copy the tokens to where y will be, each thread its share: a group of copies. A thread's packets are `step`
 * columns apart, a multiple of 128 bytes: the halves of its chunks' 128 bytes are swapped alike. */
template <typename T>
__device__ __forceinline__ void copy_tokens(const mv_task &task, const DecodeSplit &split, TokenShare<T, false> share) {
    const int hidden = static_cast<int>(task.hidden);
    const int step = Packet<T>::size << split.log_threads, at_once = kThreads >> split.log_threads;
    for (; share.token < share.tokens; share.token += at_once) {
#pragma unroll 1
        for (int k = 0; k < hidden - share.column; k += step)
            cp_async16(shared_address(&share.packet(k)), share.x + k, true);
        share.x += at_once * task.x.inner_stride;
        share.y += at_once * hidden * static_cast<int>(sizeof(T));
    }
    cp_async_commit();
}

/* From where copy_norm_weight has put them. */
template <typename T>
__device__ __forceinline__ NormWeights<T> copied_norm_weights(const mv_task &task, const char *norm_weight, int k) {
    if (task.norm.weight_dtype == Dtype<T>::value)
        return widen_norm_weights<T>(task, *reinterpret_cast<const Packet<T> *>(norm_weight + k * sizeof(T)));
    NormWeights<T> weights;
#pragma unroll
    for (int i = 0; i < Packet<T>::size; i++)
        weights.v[i] = task.norm.weight_offset + reinterpret_cast<const float *>(norm_weight)[k + i];
    return weights;
}

/* s times the norm weights as the sum of two packets, which has twice the digits of one. */
template <typename T> __device__ __forceinline__ void two_parts(Packet<T> &high, Packet<T> &low, const Packet<T> &s,
                                                                const NormWeights<T> &weights) {
    float product[Packet<T>::size];
#pragma unroll
    for (int i = 0; i < Packet<T>::size; i++) product[i] = s.get(i) * weights.v[i];
    high = pack<T>(product);
#pragma unroll
    for (int i = 0; i < Packet<T>::size; i++) product[i] -= high.get(i);
    low = pack<T>(product);
}

/* What joins the residual; the first share's blocks write the sum out. */
template <typename T, bool kLate>
__device__ __forceinline__ void join(Packet<T> &s, const Packet<T> &residual, const mv_task &task,
                                     const DecodeSplit &split, const TokenShare<T, kLate> &share, int k, int columns) {
    s = add_residual(s, residual);
    if (task.norm.residual_out.data && blockIdx.x >> split.log_groups == 0 && k < columns)
        store_packet(token_row<T>(task.norm.residual_out, share.first + share.token) + share.column + k, s,
                     Packet<T>::size, true);
}

template <typename T> __device__ __forceinline__ void add_squares(float (&squares)[2], const Packet<T> &s) {
#pragma unroll
    for (int i = 0; i < Packet<T>::size; i++) squares[i % 2] = fmaf(s.get(i), s.get(i), squares[i % 2]);
}

/* Leaves a token's sum of squares, in parts; kLanes threads or more have the token. */
template <typename T, int kLanes, bool kLate> __device__ __forceinline__ void
keep_squares(Squares squares, const TokenShare<T, kLate> &share, int hidden, const float (&own)[2]) {
    const float sum = warp_sum<kLanes>(own[0] + own[1]);
    if (threadIdx.x % kLanes == 0 && share.token < share.tokens && share.column < hidden)
        squares[share.token][share.column / (32 * Packet<T>::size)] = sum;
}

/* What copy_tokens has brought joins the residual; the sums of squares. */
template <typename T, int kLanes> __device__ __forceinline__ void
read_tokens(const mv_task &task, const DecodeSplit &split, TokenShare<T, false> share, Squares squares) {
    const int hidden = static_cast<int>(task.hidden);
    const int step = Packet<T>::size << split.log_threads, at_once = kThreads >> split.log_threads;
    for (int first = 0; first < share.tokens; first += at_once) {
        const int columns = share.token < share.tokens ? hidden - share.column : 0;
        float own[2] = {};
        for (int batch = 0; batch < columns; batch += kBatch * step) {
            Packet<T> s[kBatch] = {};
#pragma unroll
            for (int b = 0; b < kBatch; b++)
                if (batch + b * step < columns) s[b] = share.packet(batch + b * step);
            if (share.residual) {
                Packet<T> residual[kBatch];
#pragma unroll
                for (int b = 0; b < kBatch; b++) {
                    const int k = batch + b * step;
                    residual[b] = as_packet<T>(load_if(share.residual + k, k < columns));
                }
#pragma unroll
                for (int b = 0; b < kBatch; b++) {
                    const int k = batch + b * step;
                    join(s[b], residual[b], task, split, share, k, columns);
                    if (k < columns) share.packet(k) = s[b];
                }
            }
#pragma unroll
            for (int b = 0; b < kBatch; b++) add_squares(own, s[b]);
        }
        keep_squares<T, kLanes>(squares, share, hidden, own);
        share.token += at_once;
        share.x += at_once * task.x.inner_stride;
        if (share.residual) share.residual += at_once * task.norm.residual.inner_stride;
        share.y += at_once * hidden * static_cast<int>(sizeof(T));
    }
}

/* r of a token. */
template <typename T>
__device__ __forceinline__ float token_factor(const mv_task &task, const DecodeSplit &split, const float *squares) {
    const float4 low = *reinterpret_cast<const float4 *>(squares),
                 high = *reinterpret_cast<const float4 *>(squares + 4);
    const float sum = ((low.x + low.y) + (low.z + low.w)) + ((high.x + high.y) + (high.z + high.w));
    return row_factor<T>(sum, split.mean_scale, task);
}

/* y of a packet. */
template <typename T> __device__ __forceinline__ Packet<T>
normalised(const mv_task &task, bool in_pairs, const Packet<T> &s, float r, const char *norm_weight, int k) {
    if constexpr (sizeof(T) == 2)
        if (in_pairs) return apply_norm_hf(s, r, *reinterpret_cast<const Packet<T> *>(norm_weight + k * sizeof(T)));
    return apply_norm(s, r, copied_norm_weights<T>(task, norm_weight, k), mv_norm_rounds_twice(task.rounding));
}

/* Each thread finishes its share of what read_tokens has read, four packets at a time while there are as many. */
template <typename T> __device__ __forceinline__ void normalise_tokens(const mv_task &task, const DecodeSplit &split,
                                                                       TokenShare<T, false> share, Squares squares,
                                                                       const char *norm_weight) {
    const int hidden = static_cast<int>(task.hidden);
    const int step = Packet<T>::size << split.log_threads, at_once = kThreads >> split.log_threads;
    const int left = hidden - share.column;
    for (; share.token < share.tokens;
         share.token += at_once, share.y += at_once * hidden * static_cast<int>(sizeof(T))) {
        const float r = token_factor<T>(task, split, squares[share.token]);
        int k = 0;
#pragma unroll 1
        for (; k + (kBatch - 1) * step < hidden; k += kBatch * step) {
            Packet<T> y[kBatch];
#pragma unroll
            for (int b = 0; b < kBatch; b++) {
                const int inside = k + b * step < left ? k + b * step : k;
                y[b] = normalised<T>(task, split.in_pairs, share.packet(inside), r, norm_weight, share.column + inside);
            }
#pragma unroll
            for (int b = 0; b < kBatch; b++)
                if (k + b * step < left) share.packet(k + b * step) = y[b];
        }
#pragma unroll 1
        for (; k < left; k += step)
            share.packet(k) = normalised<T>(task, split.in_pairs, share.packet(k), r, norm_weight, share.column + k);
    }
}

/* Few tokens, all at once: each thread keeps its packets in registers. kLate: what it leaves is y in two parts, which
 * lack the row factor. */
template <typename T, bool kLate, int kHeld> struct Held {
    static constexpr bool few = kHeld == kFewHeld;
    const mv_task &task;
    const DecodeSplit &split;
    const TokenShare<T, kLate> &share;
    const int hidden = static_cast<int>(task.hidden), step = Packet<T>::size << split.log_threads;
    const int columns = share.token < share.tokens ? hidden - share.column : 0;
    Packet<T> s[kHeld], residual[kHeld];
    float squares[2] = {};

    template <typename Do> __device__ __forceinline__ void each(const Do &act) {
#pragma unroll
        for (int b = 0; b < kHeld; b++) {
            if (b * step >= hidden) break; /* all threads */
            act(b, b * step);
        }
    }

    /* Asks for them. */
    __device__ __forceinline__ void load() {
        each([&](int b, int k) { s[b] = as_packet<T>(load_if(share.x + k, k < columns)); });
        if (share.residual)
            each([&](int b, int k) { residual[b] = as_packet<T>(load_if(share.residual + k, k < columns)); });
    }

    /* Waits for them. */
    __device__ __forceinline__ void read(const char *norm_weight) {
        if (share.residual) each([&](int b, int k) { join(s[b], residual[b], task, split, share, k, columns); });
        each([&](int b, int k) {
            if (kLate && k < columns)
                two_parts(share.packet(k), share.next_packet(k, hidden), s[b],
                          copied_norm_weights<T>(task, norm_weight, share.column + k));
            add_squares(squares, s[b]);
        });
    }

    /* Several packets at a time where there are many. in_pairs is a constant, so that their norm weights can be asked
     * for together. */
    __device__ __forceinline__ void normalise(Squares sums, const char *norm_weight, bool in_pairs) {
        if (columns <= 0) return;
        constexpr int kAtOnce = few ? 1 : kHeld / 2;
        const float r = token_factor<T>(task, split, sums[share.token]);
#pragma unroll
        for (int first = 0; first < kHeld; first += kAtOnce) {
            if (first * step >= hidden) break; /* all threads */
            Packet<T> y[kAtOnce];
#pragma unroll
            for (int b = 0; b < kAtOnce; b++) {
                const int k = (first + b) * step, inside = k < columns ? k : 0;
                y[b] = normalised<T>(task, in_pairs, s[first + b], r, norm_weight, share.column + inside);
            }
#pragma unroll
            for (int b = 0; b < kAtOnce; b++)
                if ((first + b) * step < columns) share.packet((first + b) * step) = y[b];
        }
    }
};

} // namespace
