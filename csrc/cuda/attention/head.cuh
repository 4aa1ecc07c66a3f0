/* head.cuh: the norm and the rotary embedding of one head, by a warp (csrc/cpu/attention/head.h has the formulas). */
#pragma once

#include "cuda/arch/reduce.cuh"
#include "cuda/norm/rms_norm.cuh"

/* One head. Everything that it takes is loaded before any of it is used. Lane l has kPer columns, which are l, l + 32
 * and so on: dim is at most 32 kPer. */
template <typename T, int kPer> struct Head {
    static constexpr int kLanes = 32;
    float value[kPer], weight[kPer], cosine[kPer], sine[kPer];

    static __device__ __forceinline__ int column(int i) { return static_cast<int>(threadIdx.x % 32) + i * 32; }

    /* Of `count` values; their dtype is looked at once, and not for each. */
    static __device__ __forceinline__ void load_values(float (&to)[kPer], const void *from, mv_dtype dtype,
                                                       int64_t first, int count) {
        if (dtype == MV_F32) {
#pragma unroll
            for (int i = 0; i < kPer; i++)
                to[i] = column(i) < count ? static_cast<const float *>(from)[first + column(i)] : 0.0f;
        } else {
#pragma unroll
            for (int i = 0; i < kPer; i++)
                to[i] = column(i) < count ? to_float(static_cast<const T *>(from)[first + column(i)]) : 0.0f;
        }
    }

    /* row: the row of cos and sin. */
    __device__ __forceinline__ void load(const T *x, int dim, const mv_head_norm &norm, const mv_rotary &rotary,
                                         int64_t row, bool = true) {
        const int columns = static_cast<int>(rotary.columns);
        load_values(value, x, Dtype<T>::value, 0, dim);
        if (norm.weight) load_values(weight, norm.weight, norm.weight_dtype, 0, dim);
        if (columns == 0) return;
        load_values(cosine, rotary.cos, rotary.dtype, row * rotary.cos_stride, columns);
        load_values(sine, rotary.sin, rotary.dtype, row * rotary.sin_stride, columns);
    }

    /* Leaves the head after its norm, then after the rotary embedding, in `y`, which is shared memory: `columns`
     * values, zeros from dim on. */
    __device__ __forceinline__ void finish(int dim, const mv_head_norm &norm, const mv_rotary &rotary,
                                           mv_rounding rounding, float *y, int columns) {
        const bool twice = mv_norm_rounds_twice(rounding), rounds = mv_rounds_each_step(rounding);
        if (norm.weight) {
            float squares = 0;
#pragma unroll
            for (int i = 0; i < kPer; i++) squares = fmaf(value[i], value[i], squares);
            const float r = row_factor<T>(warp_sum(squares), mean_scale<T>(dim), norm.eps);
#pragma unroll
            for (int i = 0; i < kPer; i++) {
                if (column(i) >= dim) continue;
                value[i] = apply_norm<T>(value[i], r, norm.weight_offset + weight[i], twice);
                if (rounds) value[i] = round_to<T>(value[i]);
            }
        }
        store(y, columns);
        if (rotary.columns == 0) return;
        const int half = static_cast<int>(rotary.columns) / 2;
        const bool each = rounds && rotary.dtype == Dtype<T>::value; /* the products are rounded, too */
#pragma unroll
        for (int i = 0; i < kPer; i++) {
            const int at = column(i);
            if (at >= static_cast<int>(rotary.columns)) continue;
            const bool first = rotary.interleaved ? at % 2 == 0 : at < half;
            const int apart = rotary.interleaved ? 1 : half;
            const float other = first ? -y[at + apart] : y[at - apart];
            /* __fmul_rn: a product that joins a sum in one instruction would not be rounded. */
            float a = __fmul_rn(value[i], cosine[i]), b = __fmul_rn(other, sine[i]);
            if (each) a = round_to<T>(a), b = round_to<T>(b);
            value[i] = rounds ? round_to<T>(a + b) : a + b;
        }
        __syncwarp();
        store(y, columns);
    }

    __device__ __forceinline__ void store(float *y, int columns) const {
#pragma unroll
        for (int i = 0; i < kPer; i++)
            if (column(i) < columns) y[column(i)] = value[i];
        __syncwarp();
    }

    __device__ __forceinline__ void store_row(T *to, int dim, bool) const {
#pragma unroll
        for (int i = 0; i < kPer; i++)
            if (column(i) < dim) to[column(i)] = from_float<T>(value[i]);
    }
    static __device__ __forceinline__ void copy_row(T *to, const T *from, int dim, bool) {
#pragma unroll
        for (int i = 0; i < kPer; i++)
            if (column(i) < dim) to[column(i)] = from[column(i)];
    }
};

/* The head of most models, in fewer instructions: the rotary embedding turns all of its kLanes * kPer columns, in
 * halves, by cos and sin of the head's dtype, which the weight of the norm has, too. A lane needs nothing of another:
 * it has kPer / 2 columns of each half. There is always an embedding. */
template <typename T, int kPer, int kLanes_ = 32> struct PairedHead {
    static constexpr int kLanes = kLanes_;
    static constexpr int kHalf = kPer / 2; /* columns of a lane, of each half: a load */
    struct alignas(kHalf * sizeof(T)) Part {
        T value[kHalf];
    };
    float value[kPer], weight[kPer], cosine[kPer], sine[kPer];

    static __device__ __forceinline__ int column(int i) {
        return i / kHalf * kLanes * kHalf + static_cast<int>(threadIdx.x % kLanes) * kHalf + i % kHalf;
    }
    /* aligned: a lane's part can be loaded at once. */
    static __device__ __forceinline__ Part load_part(const T *from, bool aligned) {
        if (aligned) return *reinterpret_cast<const Part *>(from);
        Part part;
#pragma unroll
        for (int i = 0; i < kHalf; i++) part.value[i] = from[i];
        return part;
    }
    static __device__ __forceinline__ void load_values(float (&to)[kPer], const void *from, bool aligned) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const Part part = load_part(static_cast<const T *>(from) + column(half * kHalf), aligned);
#pragma unroll
            for (int i = 0; i < kHalf; i++) to[half * kHalf + i] = to_float(part.value[i]);
        }
    }
    __device__ __forceinline__ void load(const T *x, int, const mv_head_norm &norm, const mv_rotary &rotary,
                                         int64_t row, bool aligned = true) {
        load_values(value, x, aligned);
        if (norm.weight) load_values(weight, norm.weight, aligned);
        load_values(cosine, static_cast<const T *>(rotary.cos) + row * rotary.cos_stride, aligned);
        load_values(sine, static_cast<const T *>(rotary.sin) + row * rotary.sin_stride, aligned);
    }
    __device__ __forceinline__ void finish(int, const mv_head_norm &norm, const mv_rotary &, mv_rounding rounding,
                                           float *, int) {
        const bool rounds = mv_rounds_each_step(rounding);
        const auto rounded = [&](float x) { return rounds ? round_to<T>(x) : x; };
        if (norm.weight) {
            float squares = 0;
#pragma unroll
            for (int i = 0; i < kPer; i++) squares = fmaf(value[i], value[i], squares);
            const float r = row_factor<T>(warp_sum<kLanes>(squares), mean_scale<T>(kLanes * kPer), norm.eps);
            const bool twice = mv_norm_rounds_twice(rounding);
#pragma unroll
            for (int i = 0; i < kPer; i++)
                value[i] = rounded(apply_norm<T>(value[i], r, norm.weight_offset + weight[i], twice));
        }
        const auto turned = [&](float own, float cosine, float other, float sine) {
            return rounded(rounded(__fmul_rn(own, cosine)) + rounded(__fmul_rn(other, sine)));
        };
#pragma unroll
        for (int i = 0; i < kHalf; i++) {
            const float first = value[i], second = value[i + kHalf];
            value[i] = turned(first, cosine[i], -second, sine[i]);
            value[i + kHalf] = turned(second, cosine[i + kHalf], first, sine[i + kHalf]);
        }
    }
    static __device__ __forceinline__ void store_part(T *to, const Part &part, bool aligned) {
        if (aligned) {
            *reinterpret_cast<Part *>(to) = part;
            return;
        }
#pragma unroll
        for (int i = 0; i < kHalf; i++) to[i] = part.value[i];
    }
    __device__ __forceinline__ void store_row(T *to, int, bool aligned) const {
        constexpr int kWords = sizeof(Part) / 4, kPerWord = 4 / sizeof(T);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            alignas(Part) uint32_t word[kWords];
#pragma unroll
            for (int w = 0; w < kWords; w++) word[w] = pack_word<T>(value + half * kHalf + w * kPerWord);
            store_part(to + column(half * kHalf), *reinterpret_cast<const Part *>(word), aligned);
        }
    }
    static __device__ __forceinline__ void copy_row(T *to, const T *from, int, bool aligned) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int at = column(half * kHalf);
            store_part(to + at, load_part(from + at, aligned), aligned);
        }
    }
};

template <typename T, int kPer, bool kPaired> struct HeadOf { using Type = Head<T, kPer>; };
template <typename T, int kPer> struct HeadOf<T, kPer, true> { using Type = PairedHead<T, kPer>; };
