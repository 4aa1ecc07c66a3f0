/* head.cuh: the norm and the rotary embedding of one head, by a warp (csrc/cpu/head.h has the formulas). */
#pragma once

#include "reduce.cuh"
#include "rms_norm.cuh"

/* Leaves n, then y, of a head in `y`, which is shared memory: `columns` values, zeros from dim on. `row` of cos and
 * sin. */
template <typename T> __device__ __forceinline__ void prepare_head(const T *x, int dim, const mv_head_norm &norm,
                                                                   const mv_rotary &rotary, int64_t row,
                                                                   mv_rounding rounding, float *y, int columns) {
    const bool hf = rounding == MV_ROUNDING_HF;
    const int lane = threadIdx.x % 32;
    float squares = 0;
    for (int i = lane; i < columns; i += 32) {
        const float value = i < dim ? to_float(x[i]) : 0.0f;
        y[i] = value;
        squares = fmaf(value, value, squares);
    }
    if (norm.weight) {
        const float scale = sizeof(T) == 4 ? static_cast<float>(dim) : 1.0f / static_cast<float>(dim);
        const float r = row_factor<T>(warp_sum(squares), scale, norm.eps);
        for (int i = lane; i < dim; i += 32) {
            const float weight = norm.weight_offset + load_as<T>(norm.weight, norm.weight_dtype, i);
            const float value = apply_norm<T>(y[i], r, weight, hf);
            y[i] = hf ? round_to<T>(value) : value;
        }
    }
    __syncwarp();
    const bool each = hf && rotary.dtype == Dtype<T>::value; /* the products are rounded, too */
    const auto turned = [&](float value, float other, int column) {
        /* __fmul_rn: a product that joins a sum in one instruction would not be rounded. */
        float a = __fmul_rn(value, load_as<T>(rotary.cos, rotary.dtype, row * rotary.cos_stride + column));
        float b = __fmul_rn(other, load_as<T>(rotary.sin, rotary.dtype, row * rotary.sin_stride + column));
        if (each) a = round_to<T>(a), b = round_to<T>(b);
        return hf ? round_to<T>(a + b) : a + b;
    };
    const int half = static_cast<int>(rotary.columns) / 2;
    for (int i = lane; i < half; i += 32) {
        const int first = rotary.interleaved ? 2 * i : i, second = rotary.interleaved ? first + 1 : i + half;
        const float a = y[first], b = y[second];
        y[first] = turned(a, -b, first);
        y[second] = turned(b, a, second);
    }
    __syncwarp();
}
