/* rms_norm.cuh: what every kernel that begins with the norm shares: its arguments, the formula, and its roundings. */
#pragma once

#include "vec.cuh"

/* A mv_rows of a known type. */
template <typename T> struct Rows {
    T *data;
    int64_t outer_stride, inner_stride;

    __device__ __forceinline__ T *row(int64_t r, int64_t inner, bool one_level) const {
        if (one_level) return data + r * inner_stride;
        return data + (r / inner) * outer_stride + (r % inner) * inner_stride;
    }
};

template <typename T> static inline Rows<T> as_rows(mv_rows rows) {
    return {static_cast<T *>(rows.data), rows.outer_stride, rows.inner_stride};
}

/* s * r * (offset + w) with the roundings of `rounding`; the result still has to be rounded to T. */
template <typename T>
__device__ __forceinline__ float apply_norm(float s, float r, float offset_weight, bool hf) {
    const float normalised = s * r;
    return (hf ? round_to<T>(normalised) : normalised) * offset_weight;
}

/* rn(x + residual): what the norm sees and residual_out gets. */
template <typename T> __device__ __forceinline__ T add_residual(T x, T residual) {
    return from_float<T>(to_float(x) + to_float(residual));
}

/* 1 / sqrt(mean + eps) */
__device__ __forceinline__ float row_factor(float sum_of_squares, float inverse_hidden, float eps) {
    return 1.0f / sqrtf(sum_of_squares * inverse_hidden + eps);
}
