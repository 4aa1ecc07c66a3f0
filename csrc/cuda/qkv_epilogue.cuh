/* qkv_epilogue.cuh: where the outputs of the projection live, and how a finished sum becomes one of them.
 *
 * The outputs of a task are numbered through q | k | v. When the three blocks are one packed matrix the number is the
 * row of that matrix; otherwise it has to be looked up, which a kernel does once per output of its tile. */
#pragma once

#include "rms_norm.cuh"

/* Output n of a task: row `row` of block `block`. */
struct OutputPlace {
    int block;
    int64_t row;
};

__device__ __forceinline__ OutputPlace find_output(const mv_task &task, int64_t n) {
    OutputPlace place = {0, n};
    if (task.linear.packed) return place;
    while (place.block < 2 && place.row >= task.linear.block[place.block].outputs)
        place.row -= task.linear.block[place.block++].outputs;
    return place;
}

/* The address of W[n][0]. */
template <typename W> __device__ __forceinline__ const W *weight_row(const mv_task &task, OutputPlace place) {
    const mv_block &block = task.linear.block[place.block];
    return static_cast<const W *>(block.weight) + place.row * block.row_stride;
}

template <typename T> __device__ __forceinline__ float load_bias(const mv_task &task, OutputPlace place) {
    const mv_block &block = task.linear.block[place.block];
    return block.bias ? load_as_past_l1<T>(block.bias, block.bias_dtype, place.row) : 0.0f;
}

/* The epilogue: the bias joins in float32, then the one rounding. */
template <typename T> __device__ __forceinline__ T finish_output(float sum, float bias) {
    return from_float<T>(sum + bias);
}

/* The same of two neighbours of 16 bits, in one word. */
template <typename T> __device__ __forceinline__ uint32_t finish_pair(float low, float high, float2 bias) {
    const float v[2] = {low + bias.x, high + bias.y};
    return pack_word<T>(v);
}
